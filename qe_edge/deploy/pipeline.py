"""From a model to engines and a report in one call; every stage's output is a folder that the next one reads.

The outputs are `OUT/checkpoint`, `OUT/onnx`, `OUT/engines/<target>`, `OUT/report.json` and `OUT/report.html`.
`OUT/deploy.json` records the inputs of each, so that a stopped deployment can be continued.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qe_edge.checkpoint.known_files import work_folder
from qe_edge.deploy.layout import DEFAULT_TARGETS, Layout, check_deployment_folder, hold_deployment
from qe_edge.deploy.ledger import Ledger
from qe_edge.deploy.order import Order, make_order
from qe_edge.deploy.stages import Stage, run_stages
from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.export.targets import has_limits
from qe_edge.quantization.folder import quantize_to_folder
from qe_edge.quantization.run_record import Record
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.recipes.recipe import Recipe
from qe_edge.report import load_report, write_report
from qe_edge.runtime.limits import EngineLimits, with_limits
from qe_edge.runtime.manifest import read_manifest
from qe_edge.runtime.picture_limits import tell_limits
from qe_edge.system.digests import hash_parts
from qe_edge.system.progress import Progress
from qe_edge.validate import Report, validate

Announce = Callable[[str], None]


def _silent(_line: str) -> None:
    pass


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
    announce: Announce = _silent,
) -> Report:
    """Quantize, export, build, validate and report.

    Args:
        model: "demo", a folder or a hub id.
        out: Folder for everything. The files of an earlier deployment there are replaced, or kept with `resume`.
        recipe: How to quantize.
        targets: Names of the targets to build for; the first that runs here is validated.
        plugin_library: Build TensorRT targets with this plugin library; None builds all without the plugin.
        limits: Largest sizes that engines of TensorRT take; None keeps the defaults.
        evaluation: Source of held-out questions with answers.
        limit: Use only the first questions.
        resume: Skip stages whose output is complete and unchanged, and whose inputs are the same.
        device: Device that quantizes, as in `qe_edge.quantize`.
        progress: Where to report progress.
        announce: Receives one line when a stage begins or is skipped.

    Raises:
        QEError: As `make_order` and `run_order` raise.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe  # doctest: +SKIP
        >>> recipe = make_recipe(method="qe", scheme="w4a8")  # doctest: +SKIP
        >>> report = deploy("demo", Path("out/demo"), recipe, ["cpu"], limit=20)  # doctest: +SKIP
    """
    check_deployment_folder(out)  # before samples are opened
    order = make_order(
        model,
        recipe,
        targets,
        plugin_library=plugin_library,
        limits=limits,
        evaluation=evaluation,
        limit=limit,
    )
    with hold_deployment(out):
        return run_order(order, out, resume=resume, device=device, progress=progress, announce=announce)


def run_order(
    order: Order,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
    announce: Announce = _silent,
) -> Report:
    """Do the stages of an order that are not complete. The caller is inside `hold_deployment`.

    Raises:
        InputError: If `out` holds other files, also in what is to be replaced; raised before any work.
        ArtifactError: If with `resume` the model, the recipe, the calibration data or the version is another one.
        QEError: As the stages raise.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe  # doctest: +SKIP
        >>> order = make_order("demo", make_recipe(method="qe", scheme="w4a8"), ["cpu"], limit=20)  # doctest: +SKIP
        >>> with hold_deployment(Path("out/demo")):  # doctest: +SKIP
        ...     report = run_order(order, Path("out/demo"), announce=print)
    """
    check_deployment_folder(out)
    ledger = Ledger.read(Layout(out).ledger, resume=resume)
    run = order.job.record()
    if resume:
        ledger.refuse_changes(run)
    work = _Work(order, Layout(out), ledger, run, resume, device, progress, announce)
    run_stages(work.stages(), ledger, work.layout.made_later, resume=resume, announce=announce)
    return work.reports[0] if work.reports else load_report(work.layout.report)


@dataclass
class _Work:
    """The work of every stage of one order.

    Attributes:
        order: What is made.
        layout: Where.
        ledger: What is finished.
        run: What the checkpoint depends on.
        resume: Whether a stopped quantization is continued.
        device: Where to quantize.
        progress: Where to report progress.
        announce: Receives lines.
        reports: The report, once it is made.
    """

    order: Order
    layout: Layout
    ledger: Ledger
    run: Record
    resume: bool
    device: str
    progress: Progress | None
    announce: Announce
    reports: list[Report] = field(default_factory=list)

    def stages(self) -> list[Stage]:
        """The table of stages: name, outputs, hash of its own choices, the stages that it reads, and its work."""
        order, layout = self.order, self.layout
        builds = [
            Stage(
                f"engines/{target}",
                (layout.engines / target,),
                hash_parts(*order.build_key(target)),
                ("onnx",),
                partial(self._build, target),
            )
            for target in order.targets
        ]
        read = ("checkpoint", "onnx", *(stage.name for stage in builds))
        key = hash_parts(order.questions, order.limit)
        return [
            Stage("checkpoint", (layout.checkpoint,), hash_parts(self.run), (), self._quantize),
            Stage("onnx", (layout.onnx,), "", ("checkpoint",), self._export),
            *builds,
            Stage("report", (layout.report, layout.page), key, read, self._compare),
        ]

    def _quantize(self) -> None:
        checkpoint = self.layout.checkpoint
        if not self.resume:
            WorkFolder.discard(work_folder(checkpoint))
        quantize_to_folder(
            self.order.job, checkpoint, resume=self.resume, device=self.device, progress=self.progress, locked=True
        )
        self.ledger.run = self.run

    def _export(self) -> None:
        export_model(self.layout.checkpoint, self.layout.onnx, progress=self.progress)

    def _build(self, target: str) -> None:
        """One target's engines, after a line that says which sizes they take."""
        onnx, limits = self.layout.onnx, self.order.limits_of(target)
        if has_limits(target):
            manifest = read_manifest(onnx)
            tell_limits(onnx, with_limits(manifest, limits) if limits else manifest, self.announce)
        engines, library = self.layout.engines / target, self.order.plugins.get(target)
        build_engines(onnx, engines, target, plugin_library=library, limits=limits, progress=self.progress)

    def _compare(self) -> None:
        order, engines = self.order, self.layout.engines
        chosen = next(iter(order.runnable), None)
        report = validate(
            order.model,
            self.layout.checkpoint,
            engines / chosen if chosen else None,
            order.evaluation,
            onnx=self.layout.onnx,
            not_run=[engines / target for target in order.targets if target != chosen],
            plugin_library=next(iter(order.plugins.values()), None),
            limit=order.limit,
            progress=self.progress,
        )
        write_report(report, self.layout.report, self.layout.page)
        self.reports.append(report)
