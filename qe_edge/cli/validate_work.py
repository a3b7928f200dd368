"""The work of `qe-edge validate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qe_edge import report as reports
from qe_edge import validate as validation
from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import (
    ENGINES,
    ONNX,
    built_targets,
    find_checkpoint,
    find_engines,
    find_onnx,
    is_manifest_folder,
    open_model,
    runs_here,
)
from qe_edge.cli.outputs import check_output_file
from qe_edge.cli.tables import print_table
from qe_edge.models import configuration
from qe_edge.runtime.backends import check_runnable
from qe_edge.system.atomic import atomic_file
from qe_edge.system.errors import InputError


@dataclass(frozen=True)
class Folders:
    """What is compared.

    Attributes:
        checkpoint: The quantized checkpoint.
        engines: Engines of the target that runs here, None without any.
        others: Engines of further targets.
        onnx: Exported graphs, None without any.
    """

    checkpoint: Path
    engines: Path | None
    others: list[Path]
    onnx: Path | None


def choose_folders(
    checkpoint: Path, engines: Path | None, onnx: Path | None, output: Path, *, overwrite: bool
) -> Folders:
    """The folders that the user names, or that lie in the output of a deployment, and files that may be written.

    Raises:
        ArtifactError: If a folder holds nothing of its kind.
        InputError: If a file may not be written.
    """
    page = output.with_suffix(".html")
    if page == output:
        remedy = f"Give a name such as '{output.with_suffix('.json')}'."
        raise InputError(f"'{output}' is where the page is written, beside the data.", remedy)
    for file in (output, page):
        check_output_file(file, overwrite=overwrite)
    quantized = find_checkpoint(checkpoint)
    if engines is not None:
        chosen: Path | None = find_engines(engines)
        others: list[Path] = []
    else:
        built = built_targets(checkpoint) if (checkpoint / ENGINES).is_dir() else {}
        chosen = next((folder for name, folder in built.items() if runs_here(name)), None)
        others = [folder for folder in built.values() if folder != chosen]
    if onnx is not None:
        onnx = find_onnx(onnx)
    elif is_manifest_folder(checkpoint / ONNX):
        onnx = checkpoint / ONNX
    return Folders(quantized, chosen, others, onnx)


def run(
    model: str, folders: Folders, output: Path, evaluation: str, *, plugin_library: Path | None, limit: int | None
) -> Path | None:
    """Compare, and write the report as data and as a page; returns the page, which actions do not have."""
    source, page = open_model(model), output.with_suffix(".html")
    if folders.engines is not None:
        check_runnable(folders.engines, plugin_library)
    if configuration.load_family(source).acts:
        _compare_actions(source, folders, output, evaluation, plugin_library, limit)
        return None
    report = validation.validate(
        source,
        folders.checkpoint,
        folders.engines,
        evaluation,
        onnx=folders.onnx,
        not_run=folders.others,
        plugin_library=plugin_library,
        limit=limit,
        progress=ConsoleProgress(),
    )
    reports.write_report(report, output, page)
    return page


def _compare_actions(
    source: str, folders: Folders, output: Path, evaluation: str, plugin_library: Path | None, limit: int | None
) -> None:
    """Compare the actions of a model that makes them; write the report and print its table."""
    report = validation.validate_actions(
        source,
        folders.checkpoint,
        folders.engines,
        evaluation,
        onnx=folders.onnx,
        plugin_library=plugin_library,
        limit=limit,
        progress=ConsoleProgress(),
    )
    with atomic_file(output) as part:
        part.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    measured = [("quantized", report.quantized), ("engine", report.engine)]
    measured += [("engine, from the quantized one", report.engine_to_quantized)]
    print_table(
        ("question", "cameras", "quantized", "engine"),
        [
            (one.task, str(one.cameras), f"{one.quantized:.2e}", "" if one.engine is None else f"{one.engine:.2e}")
            for one in report.questions
        ],
    )
    print_table(
        ("error of actions", "mean", "median", "worst"),
        [
            (name, *(f"{value:.2e}" for value in (found.mean, found.median, found.worst)))
            for name, found in measured
            if found is not None
        ],
    )
