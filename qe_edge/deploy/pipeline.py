"""From a model to engines and a report in one call; every stage's output is a folder that the next one reads.

`OUT/checkpoint`, `OUT/onnx`, `OUT/engines/<target>`, `OUT/report.json` and `OUT/report.html`; `OUT/deploy.json` says
what each of them was made from, so that a stopped deployment can be continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qe_edge.deploy.ledger import Ledger
from qe_edge.deploy.stages import Stage, run_stages
from qe_edge.models.fingerprints import model_parts
from qe_edge.quantization.run_record import make_record
from qe_edge.system.digests import hash_parts
from qe_edge.system.errors import InputError
from qe_edge.system.locks import hold
from qe_edge.system.ownership import is_passing, refuse_strangers
from qe_edge.system.progress import Progress

if TYPE_CHECKING:
    from qe_edge.models.family import Sample
    from qe_edge.recipes.recipe import Recipe
    from qe_edge.runtime.limits import EngineLimits
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

    def made_later(self) -> list[Path]:
        """Folders of what is made from a checkpoint, for whatever target."""
        engines = sorted(self.engines.iterdir()) if self.engines.is_dir() and not self.engines.is_symlink() else []
        return [self.onnx, *(path for path in engines if path.is_dir())]


def deploy(  # noqa: PLR0913 - the choices of every stage
    model: str,
    out: Path,
    recipe: Recipe,
    targets: Sequence[str] = DEFAULT_TARGETS,
    *,
    plugin_library: Path | None = None,
    limits: EngineLimits | None = None,
    evaluation: str = "demo",
    limit: int | None = None,
    resume: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda _line: None,
    locked: bool = False,
) -> Report:
    """Quantize, export, build, validate and report.

    Args:
        model: "demo", a folder or a hub id.
        out: Folder for everything; what an earlier deployment left there is replaced, or kept with `resume`.
        recipe: How to quantize.
        targets: Names of the targets to build for; the first that runs here is validated.
        plugin_library: Build TensorRT targets with this plugin library; None builds all without the plugin.
        limits: Largest sizes that engines of TensorRT take; None keeps the defaults.
        evaluation: Source of held-out questions with answers.
        limit: Use only the first questions.
        resume: Skip stages whose output is complete, as it was written, and made from the same.
        device: Where to quantize, as of `qe_edge.quantize`.
        progress: Where to report progress.
        announce: Receives one line when a stage begins or is skipped.
        locked: Whether the caller is inside `hold_deployment`.

    Raises:
        InputError: If `out` holds other files, also in what is to be replaced, no target takes the plugin, or the model
            cannot have such limits; raised, as the next ones, before any work.
        ResourceError: If another process deploys to `out` or quantizes to its checkpoint.
        ArtifactError: If with `resume` the model, the recipe, the calibration data or the version is another one.
        TargetError: If a target cannot be built here, or the plugin library does not serve or refuses a layer.
        QEError: As the stages raise.
    """
    from qe_edge.calibration.sources import hash_samples, load_evaluation, load_samples
    from qe_edge.export.decoding import check_decoding
    from qe_edge.export.exporter import export_model
    from qe_edge.models.loading import resolve_model
    from qe_edge.quantization.workfolder import WorkFolder
    from qe_edge.report import load_report, write_report
    from qe_edge.validate import validate

    runnable = check_targets(targets)
    plugins = {} if plugin_library is None else _plugins(targets, plugin_library)
    source = resolve_model(model)
    check_decoding(source)
    if limits is not None:
        _check_limits(limits, source)
    layout = Layout(out)
    with nullcontext() if locked else hold_deployment(out):
        check_deployment_folder(out)
        drawn = recipe.calibration
        samples = load_samples(drawn.source, drawn.samples, recipe.seed, asked=drawn.asks)
        questions = hash_samples(load_evaluation(evaluation))  # opens every picture: a broken one is found at once
        if plugins:
            _check_layers(plugins, model, recipe, samples)
        ledger = Ledger.read(layout.ledger, resume=resume)
        run = make_record(model_parts(model), stored_recipe(recipe, samples))
        if resume:
            ledger.refuse_changes(run)
        reports: list[Report] = []

        def write_checkpoint() -> None:
            if not resume:
                WorkFolder.discard(work_folder(layout.checkpoint))
            quantize_to_folder(
                model, recipe, layout.checkpoint, resume=resume, device=device, progress=progress, locked=True
            )
            ledger.run = run

        def build(target: str) -> None:
            _build(layout, target, plugins.get(target), limits, progress, announce)

        def compare() -> None:
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
            reports.append(report)

        builds = tuple(f"engines/{target}" for target in targets)
        stages = [
            Stage("checkpoint", (layout.checkpoint,), hash_parts(run), (), write_checkpoint),
            Stage(
                "onnx",
                (layout.onnx,),
                "",
                ("checkpoint",),
                lambda: export_model(layout.checkpoint, layout.onnx, progress=progress),
            ),
            *(
                Stage(
                    f"engines/{target}",
                    (layout.engines / target,),
                    hash_parts(target, *_digests(plugins.get(target)), *_sizes(target, limits)),
                    ("onnx",),
                    partial(build, target),
                )
                for target in targets
            ),
            Stage(
                "report",
                (layout.report, layout.page),
                hash_parts(questions, limit),
                ("checkpoint", "onnx", *builds),
                compare,
            ),
        ]
        run_stages(stages, ledger, layout.made_later, resume=resume, announce=announce)
        return reports[0] if reports else load_report(layout.report)


def _build(
    layout: Layout,
    target: str,
    library: Path | None,
    limits: EngineLimits | None,
    progress: Progress | None,
    announce: Callable[[str], None],
) -> None:
    """One target's engines, after a line that says which sizes they take."""
    from qe_edge.export.build import build_engines
    from qe_edge.export.targets import has_limits
    from qe_edge.runtime.limits import with_limits
    from qe_edge.runtime.manifest import read_manifest
    from qe_edge.runtime.picture_limits import tell_limits

    wanted = limits if has_limits(target) else None
    if has_limits(target):
        manifest = read_manifest(layout.onnx)
        tell_limits(layout.onnx, with_limits(manifest, wanted) if wanted else manifest, announce)
    engines = layout.engines / target
    build_engines(layout.onnx, engines, target, plugin_library=library, limits=wanted, progress=progress)


@contextmanager
def hold_deployment(out: Path) -> Iterator[None]:
    """No other process deploys to a folder, or quantizes to its checkpoint, while the context is open.

    Raises:
        ResourceError: If one does; it is raised at once.
    """
    layout = Layout(out)
    with hold(layout.ledger, out), hold(layout.checkpoint):
        yield


def check_deployment_folder(out: Path) -> None:
    """Refuse a folder that holds something, and no deployment.

    Raises:
        InputError: If it does.
    """
    found = [path.name for path in out.iterdir() if not is_passing(path.name)] if out.is_dir() else []
    if found and not is_deployment(out):
        raise InputError(f"'{out}' holds files that 'deploy' did not write.", "Choose another folder.")


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
    from qe_edge.quantization.plan import make_plan, planned_forms

    forms = planned_forms(make_plan(resolve_model(model), recipe, samples), recipe)
    check_forms([get_target(name) for name in plugins], next(iter(plugins.values())), forms)


def _check_limits(limits: EngineLimits, source: str) -> None:
    """Refuse limits that the model cannot have, before it is quantized."""
    from qe_edge.models.configuration import load_family
    from qe_edge.models.decoder import default_lengths
    from qe_edge.runtime.limits import EngineLimits, resolve_limits

    family = load_family(source)
    context, prompt = default_lengths(family.config.get_text_config())
    pictures = {family.picture_unit: 1} if family.picture_unit else {}
    present = EngineLimits(context=context, prompt=prompt, **pictures)
    resolve_limits(limits, present, family.model_type, family.config.get_text_config().max_position_embeddings)


def _sizes(target: str, limits: EngineLimits | None) -> list[dict[str, int]]:
    """What a build with limits was made from besides."""
    from qe_edge.export.targets import has_limits

    given = {} if limits is None else {name: size for name, size in asdict(limits).items() if size is not None}
    return [given] if given and has_limits(target) else []


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
    locked: bool = False,
) -> None:
    """Quantize a model and write the checkpoint; finished blocks lie in `<output>.work` until it is complete.

    Args:
        model: "demo", a folder or a hub id.
        recipe: What to do.
        output: Folder of the checkpoint; it appears when it is complete.
        resume: Continue from the finished blocks of a stopped run.
        device: As of `qe_edge.quantize`.
        progress: Where to report progress.
        locked: Whether the caller holds the lock on `output`.

    Raises:
        InputError: If `output` holds files that QE-Edge did not write.
        ResourceError: If another process writes there, or the disk is full.
        QEError: As `qe_edge.quantize`.
    """
    from qe_edge.models.quantized import save_quantized
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.quantization.workfolder import WorkFolder

    work = work_folder(output)
    with nullcontext() if locked else hold(output):
        refuse_strangers(output)
        loaded, resolved = quantize(
            model, recipe, work=work, resume=resume, on_disk=True, device=device, progress=progress
        )
        save_quantized(loaded, resolved, output, WorkFolder.run_of(work))
        WorkFolder.discard(work)


def work_folder(output: Path) -> Path:
    """Where the finished blocks of a checkpoint lie until it is complete."""
    return output.with_name(f"{output.name}.work")


def stored_recipe(recipe: Recipe, samples: Sequence[Sample]) -> Recipe:
    """The recipe as a checkpoint made from these samples stores it."""
    from qe_edge.quantization.quantizer import replace_calibration

    return replace_calibration(recipe, None, samples)
