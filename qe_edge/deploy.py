"""From a model to engines and a report in one call; every stage's output is a folder that the next one reads.

`OUT/checkpoint`, `OUT/onnx`, `OUT/engines/<target>`, `OUT/report.json` and `OUT/report.html`; `OUT/deploy.json` says
what each of them was made from, so that a stopped deployment can be continued.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import qe_edge
from qe_edge.atomic import atomic_file
from qe_edge.errors import InputError
from qe_edge.progress import Progress

if TYPE_CHECKING:
    from qe_edge.models.family import Sample
    from qe_edge.recipe import Recipe
    from qe_edge.validate.schema import Report

LEDGER = "deploy.json"
DEFAULT_TARGETS = ("cpu",)


@dataclass(frozen=True)
class Layout:
    """Where a deployment's outputs lie.

    Attributes:
        root: The folder that holds everything.
    """

    root: Path

    @property
    def checkpoint(self) -> Path:
        """The quantized checkpoint."""
        return self.root / "checkpoint"

    @property
    def onnx(self) -> Path:
        """The exported graphs."""
        return self.root / "onnx"

    @property
    def engines(self) -> Path:
        """One folder for every target."""
        return self.root / "engines"

    @property
    def report(self) -> Path:
        """The report as data."""
        return self.root / "report.json"

    @property
    def page(self) -> Path:
        """The report as a page."""
        return self.root / "report.html"

    @property
    def ledger(self) -> Path:
        """What each stage was made from."""
        return self.root / LEDGER

    def clear_after_checkpoint(self) -> None:
        """Remove what was made from an earlier checkpoint, and nothing else."""
        for folder in (self.onnx, self.engines):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.report, self.page):
            file.unlink(missing_ok=True)


def deploy(  # noqa: PLR0913 - the choices of every stage
    model: str,
    out: Path,
    recipe: Recipe,
    targets: Sequence[str] = DEFAULT_TARGETS,
    *,
    plugin_library: Path | None = None,
    evaluation: str = "demo",
    limit: int | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Quantize, export, build, validate and report.

    Args:
        model: "demo", a folder or a hub id.
        out: Folder for everything; what an earlier deployment left there is replaced, or kept with `resume`.
        recipe: How to quantize.
        targets: Names of the targets to build for; the first that runs here is validated.
        plugin_library: Build TensorRT targets with this plugin library; None builds all without the plugin.
        evaluation: Source of held-out questions with answers.
        limit: Use only the first questions.
        resume: Skip stages whose output is complete and was made from the same model, recipe and data.
        device: Where to quantize, as of `qe_edge.quantize`.
        progress: Where to report progress.
        announce: Receives one line when a stage begins or is skipped.

    Raises:
        InputError: If `out` holds other files, or no target takes the plugin; raised, as the next one, before anything
            else is done.
        TargetError: If a target cannot be built here, or the plugin library does not serve or refuses a layer.
        QEError: As the stages raise.
    """
    from qe_edge.calibration.sources import hash_samples, load_evaluation, load_samples
    from qe_edge.export.build import build_engines
    from qe_edge.export.decoding import check_decoding
    from qe_edge.export.exporter import export_model
    from qe_edge.models.loading import resolve_model
    from qe_edge.report import load_report, write_report
    from qe_edge.validate import validate

    runnable = check_targets(targets)
    plugins = {} if plugin_library is None else _plugins(targets, plugin_library)
    if out.is_dir() and any(out.iterdir()) and not is_deployment(out):
        raise InputError(f"'{out}' holds files that 'deploy' did not write.", "Choose another folder.")
    check_decoding(resolve_model(model))
    layout = Layout(out)
    samples = load_samples(recipe.calibration.source, recipe.calibration.samples, recipe.seed)
    questions = hash_samples(load_evaluation(evaluation))  # opens every picture: a broken one is found before the work
    if plugins:
        _check_layers(plugins, model, recipe, samples)
    ledger = _Ledger(layout.ledger, resume=resume)
    key = _hash(qe_edge.__version__, model_fingerprint(model), stored_recipe(recipe, samples).model_dump_json())
    if ledger.begin("checkpoint", key, layout.checkpoint, announce):
        if not resume:
            shutil.rmtree(work_folder(layout.checkpoint), ignore_errors=True)
        quantize_to_folder(model, recipe, layout.checkpoint, resume=resume, device=device, progress=progress)
        layout.clear_after_checkpoint()
        ledger.finish("checkpoint", key)
    key = _hash(key, "onnx")
    if ledger.begin("onnx", key, layout.onnx, announce):
        export_model(layout.checkpoint, layout.onnx, progress=progress)
        ledger.finish("onnx", key)
    builds = {target: _hash(key, target, *_digests(plugins.get(target))) for target in targets}
    for target, built in builds.items():
        if ledger.begin(f"engines/{target}", built, layout.engines / target, announce):
            library = plugins.get(target)
            build_engines(layout.onnx, layout.engines / target, target, plugin_library=library, progress=progress)
            ledger.finish(f"engines/{target}", built)
    key = _hash(key, *builds.values(), questions, str(limit))
    if not ledger.begin("report", key, layout.report, announce):
        return load_report(layout.report)
    chosen = next(iter(runnable), None)
    report = validate(
        model,
        layout.checkpoint,
        layout.engines / chosen if chosen else None,
        evaluation,
        onnx=layout.onnx,
        not_run=[layout.engines / target for target in targets if target != chosen],
        plugin_library=plugin_library,
        limit=limit,
        progress=progress,
    )
    write_report(report, layout.report, layout.page)
    ledger.finish("report", key)
    return report


def check_targets(targets: Sequence[str]) -> list[str]:
    """Check targets before any work, and return those whose engines run on this machine too.

    Raises:
        UnknownNameError: If there is no target of a name.
        TargetError: If one cannot be built here.
    """
    from qe_edge.export.targets import get_target

    for name in targets:
        get_target(name).check()
    return [name for name in targets if get_target(name).run_problem() is None]


def _plugins(targets: Sequence[str], library: Path) -> dict[str, Path]:
    """The plugin library for every target that takes one, checked."""
    from qe_edge.export.plugin_check import choose_plugin, takes_plugin
    from qe_edge.export.targets import get_target

    found = choose_plugin(targets, library)
    return {name: found for name in targets if takes_plugin(get_target(name))}


def _check_layers(plugins: Mapping[str, Path], model: str, recipe: Recipe, samples: Sequence[Sample]) -> None:
    """Refuse layers that the plugin cannot run."""
    from qe_edge.export.plugin_check import check_forms
    from qe_edge.export.targets import get_target
    from qe_edge.models.loading import resolve_model
    from qe_edge.plan import make_plan, planned_forms

    forms = planned_forms(make_plan(resolve_model(model), recipe, samples), recipe)
    check_forms([get_target(name) for name in plugins], next(iter(plugins.values())), forms)


def _digests(library: Path | None) -> list[str]:
    """What a build with a library was made from besides: its hash."""
    from qe_edge.runtime.plugin_library import digest

    return [] if library is None else [digest(library)]


def is_deployment(folder: Path) -> bool:
    """Whether a folder was written by `deploy`, be it complete or not."""
    layout = Layout(folder)
    signs = (layout.ledger, work_folder(layout.checkpoint) / "run.json", layout.checkpoint / "recipe.json")
    return any(sign.is_file() for sign in signs)


def quantize_to_folder(
    model: str,
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> None:
    """Quantize a model and write the checkpoint; finished blocks lie in `<output>.work` until it is complete.

    Args:
        model: "demo", a folder or a hub id.
        recipe: What to do.
        output: Folder of the checkpoint; it appears when it is complete.
        resume: Continue from the finished blocks of a stopped run.
        device: As of `qe_edge.quantize`.
        progress: Where to report progress.

    Raises:
        QEError: As `qe_edge.quantize`, and ResourceError if the disk is full.
    """
    from qe_edge.checkpoint import save_quantized
    from qe_edge.quantizer import quantize
    from qe_edge.workfolder import WorkFolder

    work = work_folder(output)
    loaded, resolved = quantize(model, recipe, work=work, resume=resume, on_disk=True, device=device, progress=progress)
    save_quantized(loaded, resolved, output)
    WorkFolder(work).remove()


def work_folder(output: Path) -> Path:
    """Where the finished blocks of a checkpoint lie until it is complete."""
    return output.with_name(f"{output.name}.work")


def stored_recipe(recipe: Recipe, samples: Sequence[Sample]) -> Recipe:
    """The recipe as a checkpoint made from these samples stores it."""
    from qe_edge.quantizer import replace_calibration

    return replace_calibration(recipe, None, samples)


def model_fingerprint(reference: str) -> str:
    """Hash of a model's files, or of the hub id and its revision."""
    from qe_edge.models.loading import load_config, resolve_model

    source = resolve_model(reference)
    folder = Path(source)
    if not folder.is_dir():
        return _hash(source, str(getattr(load_config(source), "_commit_hash", None)))
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class _Ledger:
    """For every finished stage the hash of what it was made from; without `resume` nothing counts as finished."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if resume else None
        except (OSError, ValueError):
            values = None
        self._keys: dict[str, object] = values if isinstance(values, dict) else {}

    def begin(self, stage: str, key: str, output: Path, announce: Callable[[str], None]) -> bool:
        """Whether the stage has to run, because its output is missing or was made from something else."""
        complete = self._keys.get(stage) == key and output.exists()
        announce(f"{output}: complete already" if complete else f"{output}")
        return not complete

    def finish(self, stage: str, key: str) -> None:
        """Note that a stage is complete."""
        self._keys[stage] = key
        with atomic_file(self._path) as part:
            part.write_text(json.dumps(self._keys, indent=2) + "\n", encoding="utf-8")


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
