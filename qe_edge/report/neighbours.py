"""Check whether the folders beside a report are still the ones that it measured."""

from __future__ import annotations

from pathlib import Path

from qe_edge.checkpoint.files import check_checkpoint, read_checkpoint_files
from qe_edge.runtime.manifest import read_manifest
from qe_edge.system.errors import ArtifactError
from qe_edge.validate.schema import Artifact, Report

CHANGED = "'{path}' is not what this report measured: {reason}. Validate again."
NOT_FOUND = "None of the measured folders lies beside the report, so it was not compared with them."


def find_changes(report: Report, file: Path) -> list[str]:
    """Return one sentence for every folder beside a report that has changed since.

    A folder is looked for by its name beside the report and in `engines` beside it. Its files are read once. If none
    is found, one sentence says that nothing was compared.

    Args:
        report: The report.
        file: The file that it was read from.

    Example:
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> file = Path("out/demo/report.json")  # doctest: +SKIP
        >>> find_changes(load_report(file), file)  # doctest: +SKIP
    """
    found = []
    compared = 0
    for artifact in report.artifacts:
        for path in _places(artifact, file.absolute().parent):
            if artifact.stage != "original" and path.is_dir():
                compared += 1
                reason = _difference(artifact, path)
                found += [CHANGED.format(path=path, reason=reason)] if reason else []
                break
    return found if compared else [NOT_FOUND]


def _places(artifact: Artifact, folder: Path) -> list[Path]:
    if Path(artifact.name).name != artifact.name or artifact.name == ".." or "\0" in artifact.name:
        return []
    return [folder / artifact.name, folder / "engines" / artifact.name]


def _difference(artifact: Artifact, path: Path) -> str | None:
    """Return how a folder differs from an artifact, or None if it does not."""
    try:
        if artifact.stage == "checkpoint":
            digest = read_checkpoint_files(path).digest
            check_checkpoint(path)
        else:
            digest = read_manifest(path).digest
    except ArtifactError as error:
        return error.problem.rstrip(".")
    return None if digest == artifact.digest else "it was written again since"
