"""Checks that folders belong together: an original model, its checkpoint, the graphs exported from it, their engines.

Only descriptions are read here; each folder's files are compared with its description when it is opened.
"""

from __future__ import annotations

from pathlib import Path

from qe_edge.checkpoint.files import FILES, difference, read_checkpoint_files
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.manifest import AnyManifest, read_any_description
from qe_edge.system.errors import ArtifactError

SHOWN = 12  # digits of a digest in a message
NO_ORIGIN = "The checkpoint does not say which model it was made from, so it could not be compared with the original."
NO_REVISION = "The original is not on the side (folder or hub) that the checkpoint names, so the two were not compared."


def describe_engines(folder: Path) -> AnyManifest:
    """The manifest of an ONNX or engine folder, which is that of its engines.

    Raises:
        ArtifactError: If the folder is damaged, or its two descriptions do not belong together.

    Example:
        >>> describe_engines(Path("out/demo/engines/cpu")).quantization  # doctest: +SKIP
    """
    manifest, info = read_any_description(folder), read_engine_info(folder)
    if info is not None:
        info.check_belongs(manifest, folder)
    return manifest


def check_exported_from(checkpoint: Path, folder: Path) -> None:
    """Refuse graphs or engines of another checkpoint.

    Raises:
        ArtifactError: If they are.

    Example:
        >>> check_exported_from(Path("out/demo/checkpoint"), Path("out/demo/onnx"))  # doctest: +SKIP
    """
    wanted, found = read_checkpoint_files(checkpoint).digest, describe_engines(folder).checkpoint
    if found is None:
        raise ArtifactError(
            f"'{folder}' was exported from a model in memory, not from the checkpoint '{checkpoint}'.",
            "Export the checkpoint with 'qe-edge export' and build again.",
        )
    if found != wanted:
        raise ArtifactError(
            f"'{folder}' was made from another checkpoint ({found[:SHOWN]}) than '{checkpoint}' ({wanted[:SHOWN]}).",
            "Export this checkpoint and build again, or give the checkpoint that it was made from.",
        )


def check_built_from(onnx: Path, engines: Path) -> None:
    """Refuse engines that were built from other graphs; graphs are their own engines in ONNX Runtime.

    Raises:
        ArtifactError: If they were.

    Example:
        >>> check_built_from(Path("out/demo/onnx"), Path("out/demo/engines/cpu"))  # doctest: +SKIP
    """
    graphs, built = describe_engines(onnx), describe_engines(engines)
    wanted, found = graphs.onnx or graphs.digest, built.onnx or built.digest
    if found != wanted:
        raise ArtifactError(
            f"'{engines}' was built from other graphs ({found[:SHOWN]}) than '{onnx}' ({wanted[:SHOWN]}).",
            "Build these graphs again, or give the folder that the engines were built from.",
        )


def check_quantized_from(checkpoint: Path, original: str, revision: str | None) -> str | None:
    """Refuse a checkpoint of another model; costs about half a second for a gigabyte of the original.

    Args:
        checkpoint: The checkpoint.
        original: Folder or hub id of the model that it is said to be made from.
        revision: Commit of a model on the hub.

    Returns:
        Why the two could not be compared, None if they were.

    Raises:
        ArtifactError: If the checkpoint was made from another model.

    Example:
        >>> from qe_edge.checkpoint.files import write_checkpoint_files
        >>> for name in ("model", "checkpoint"):
        ...     Path(name).mkdir()
        ...     _ = Path(name, "config.json").write_text("{}")
        >>> write_checkpoint_files(Path("checkpoint"), "model", revision=None)
        >>> check_quantized_from(Path("checkpoint"), "model", revision=None) is None  # they were compared, and fit
        True
    """
    origin, folder = read_checkpoint_files(checkpoint).origin, Path(original)
    if origin is None:
        return NO_ORIGIN
    if folder.is_dir() and origin.hub is None:
        other = difference(origin, folder)
    elif not folder.is_dir() and origin.hub is not None and origin.revision and revision:
        other = None if origin.revision == revision else f"revision {revision[:SHOWN]}"
    else:
        return NO_REVISION
    if other is not None:
        raise ArtifactError(
            f"The checkpoint '{checkpoint}' was not made from '{original}' as it is now: '{other}' is not the same.",
            "Give the model that was quantized, or quantize this one.",
        )
    return None


def check_deployment(root: Path, found: Path) -> None:
    """Refuse graphs or engines inside a deployment's folder that were not made from the checkpoint there.

    Raises:
        ArtifactError: If they were made from another one.

    Example:
        >>> check_deployment(Path("out/demo"), Path("out/demo/engines/cpu"))  # doctest: +SKIP
    """
    checkpoint = root / "checkpoint"
    if found not in (root, checkpoint) and (checkpoint / FILES).is_file():
        check_exported_from(checkpoint, found)
