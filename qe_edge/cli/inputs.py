"""What the user points at: a model, or the output of any stage from which the wanted one can be found.

`OUT` of `qe-edge deploy` holds `checkpoint`, `onnx`, `engines/<target>` and `report.json`; every command that reads one
of those also takes `OUT`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.system.errors import ArtifactError, InputError, ModelError, UnknownNameError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.export import targets
    from qe_edge.models import configuration, loading
else:
    configuration = lazy_module("qe_edge.models.configuration")
    loading = lazy_module("qe_edge.models.loading")
    targets = lazy_module("qe_edge.export.targets")

CHECKPOINT, ONNX, ENGINES, REPORT = "checkpoint", "onnx", "engines", "report.json"


def open_model(reference: str) -> str:
    """Folder or hub id of an original model, with its files checked.

    Raises:
        ModelError: If there is none, it is quantized already, or its files do not hold exactly its tensors.
        ArtifactError: If a file is damaged.
    """
    folder = Path(reference)
    for quantized in (folder, folder / CHECKPOINT):
        if is_checkpoint(quantized):
            raise ModelError(f"'{reference}' is quantized already.", "Give the original model.")
    source = loading.resolve_model(reference)
    if Path(source).is_dir():  # of a model on the hub it is said when its weights have been downloaded
        loading.check_exact(source, configuration.load_family(source))
    return source


def is_manifest_folder(folder: Path) -> bool:
    """Whether a folder holds exported graphs or engines."""
    return (folder / "manifest.json").is_file()


def find_checkpoint(path: Path) -> Path:
    """The quantized checkpoint that `path` is or contains.

    Raises:
        ArtifactError: If there is none.
    """
    return _find(path, CHECKPOINT, is_checkpoint, "quantized checkpoint", "qe-edge quantize MODEL -o DIR")


def find_onnx(path: Path) -> Path:
    """The folder of ONNX graphs that `path` is or contains.

    Raises:
        ArtifactError: If there is none.
    """
    return _find(path, ONNX, is_manifest_folder, "ONNX graphs", "qe-edge export DIR -o ONNX")


def find_engines(path: Path, target: str | None = None) -> Path:
    """One target's engines that `path` is or contains: the wanted target's, else the first that runs here.

    Raises:
        ArtifactError: If there are none.
        UnknownNameError: If there are none of the wanted target.
        InputError: If a target is wanted of a folder that holds one target's engines only.
    """
    if is_manifest_folder(path):
        if target is not None:
            raise InputError(f"'{path}' holds the engines of one target.", "Leave --target out.")
        return path
    built = built_targets(path)
    if target is not None and target not in built:
        raise UnknownNameError(f"engine in '{path}' for target", target, built)
    if not built:
        raise _not_found(path, "engines", "qe-edge build ONNX -o ENGINES --target NAME")
    if target is None:
        target = next((name for name in built if runs_here(name)), next(iter(built)))
    return built[target]


def built_targets(path: Path) -> dict[str, Path]:
    """Folder of every target's engines in `path` or `path/engines`, in alphabetical order."""
    folder = path / ENGINES if (path / ENGINES).is_dir() else path
    return {part.name: part for part in sorted(folder.iterdir()) if is_manifest_folder(part)} if folder.is_dir() else {}


def runs_here(target: str) -> bool:
    """Whether this machine can run a target's engines; a folder of any other name may hold anything."""
    return target not in targets.TARGETS or targets.TARGETS[target].run_problem() is None


def find_runnable(path: Path, target: str | None = None) -> Path:
    """What `path` holds that can answer a question: engines, else ONNX graphs, else a checkpoint.

    Raises:
        ArtifactError: If there is nothing of the kind.
    """
    if target is None:
        if is_manifest_folder(path) or is_checkpoint(path):
            return path
        if not built_targets(path):
            for folder, is_ours in ((path / ONNX, is_manifest_folder), (path / CHECKPOINT, is_checkpoint)):
                if is_ours(folder):
                    return folder
    return find_engines(path, target)


def find_report(path: Path) -> Path:
    """The report that `path` is or contains.

    Raises:
        ArtifactError: If there is none.
    """
    for file in (path, path / REPORT):
        if file.is_file():
            return file
    raise _not_found(path, "report", "qe-edge validate MODEL DIR -o FILE.json")


def _find(path: Path, part: str, is_ours: Callable[[Path], bool], wanted: str, made_by: str) -> Path:
    for folder in (path, path / part):
        if is_ours(folder):
            return folder
    raise _not_found(path, wanted, made_by)


def _not_found(path: Path, wanted: str, made_by: str) -> ArtifactError:
    what = f"'{path}' holds no {wanted}" if path.exists() else f"There is no folder '{path}'"
    return ArtifactError(f"{what}.", f"Make it with '{made_by}'.")
