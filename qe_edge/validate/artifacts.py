"""The folders that a report measured: each with its digest, and checked to belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qe_edge.checkpoint.files import read_checkpoint_files
from qe_edge.models.configuration import load_config
from qe_edge.models.loading import resolve_model
from qe_edge.runtime.provenance import check_built_from, check_exported_from, check_quantized_from, describe_engines
from qe_edge.validate.schema import Artifact


def trace_artifacts(
    original: str, name: str, checkpoint: Path, onnx: Path | None, engines: Sequence[Path]
) -> tuple[list[Artifact], list[str]]:
    """Check that all folders were made from one model.

    Args:
        original: The original model: "demo", a folder or a hub id.
        name: Its name in the report.
        checkpoint: Folder of the quantized checkpoint.
        onnx: Folder of the exported graphs, if there is one.
        engines: Folders of built targets.

    Returns:
        The artifacts for the report, and notes on what could not be compared.

    Raises:
        ArtifactError: If a folder is of another model, checkpoint or export than the others, or is damaged.

    Example:
        >>> made = Path("out/demo")  # doctest: +SKIP
        >>> artifacts, notes = trace_artifacts("demo", "demo", made / "checkpoint", made / "onnx", [])  # doctest: +SKIP
        >>> [(artifact.stage, artifact.name) for artifact in artifacts]  # doctest: +SKIP
    """
    described = read_checkpoint_files(checkpoint)
    for folder in ([onnx] if onnx else []) + list(engines):
        check_exported_from(checkpoint, folder)
    if onnx is not None:
        for folder in engines:
            check_built_from(onnx, folder)
    source = resolve_model(original)
    revision = None if Path(source).is_dir() else getattr(load_config(source), "_commit_hash", None)
    note = check_quantized_from(checkpoint, source, revision)
    digest = None if described.origin is None or note else described.origin.digest()
    found = [
        Artifact(stage="original", name=name, digest=digest),
        Artifact(stage="checkpoint", name=checkpoint.resolve().name, digest=described.digest),
    ]
    if onnx is not None:
        found.append(Artifact(stage="onnx", name=onnx.resolve().name, digest=describe_engines(onnx).digest))
    found += [
        Artifact(stage="engines", name=folder.resolve().name, digest=describe_engines(folder).digest)
        for folder in engines
    ]
    return found, [note] if note else []
