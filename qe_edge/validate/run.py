"""Validation of a checkpoint, and of the engine built from it, against the original model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from qe_edge.budget.accounting import FileSize
from qe_edge.calibration.sources import hash_samples, load_evaluation, load_samples
from qe_edge.demo import model_path
from qe_edge.export.decoding import check_decoding
from qe_edge.models.family import Sample
from qe_edge.models.loading import DEMO
from qe_edge.recipes.recipe import Recipe
from qe_edge.recipes.stored import load_checkpoint_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.system.errors import CalibrationError
from qe_edge.system.progress import Progress, Silent
from qe_edge.system.version import VERSION
from qe_edge.validate.answers import score
from qe_edge.validate.artifacts import trace_artifacts
from qe_edge.validate.comparison import distance_of
from qe_edge.validate.evaluation import Comparisons, Evaluation, Questions, evaluate
from qe_edge.validate.examples import choose_examples
from qe_edge.validate.latency import measure_latency
from qe_edge.validate.machine import busy_note, describe_machine
from qe_edge.validate.schema import Artifact, Contender, EngineAgreement, EvaluationData, Latency, Report, Role
from qe_edge.validate.shuffling import shuffle_pictures
from qe_edge.validate.sizes import model_size, stage_sizes
from qe_edge.validate.targets import runtime_name, target_states

NO_CALIBRATION = "The calibration samples could not be read again, so layer errors are given on held-out samples only."
NO_SHUFFLE = "The pictures cannot be exchanged among these questions, so the shuffled-images row is missing."
LIMITED = "Only the first {count} questions were used."


def validate(  # noqa: PLR0913 - everything that a report tells of
    original: str,
    checkpoint: Path,
    engines: Path | None,
    evaluation: str,
    *,
    onnx: Path | None = None,
    not_run: Sequence[Path] = (),
    plugin_library: Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare a quantized checkpoint, and the engine built from it, with the original model.

    Args:
        original: The original model: "demo", a folder or a hub id.
        checkpoint: Folder of the quantized checkpoint.
        engines: Folder of one target's engine, or None to leave the engine out.
        evaluation: Source of held-out questions with answers.
        onnx: Folder of the exported graphs, for their sizes; None to leave them out.
        not_run: Folders of further targets that were built and cannot run here; the report says so.
        plugin_library: For engines with the plugin: its library, None for the one that is found.
        limit: Use only the first questions; None uses all.
        progress: Where to report progress.

    Raises:
        ArtifactError: If the folders were not made from each other. This is checked before any work.
        CalibrationError: If there is no question with an answer.
        TargetError: If this machine cannot run the engine.
        QEError: Of other kinds, if a part cannot be loaded.

    Example:
        >>> report = validate("demo", Path("checkpoint"), Path("engines/cpu"), "demo")  # doctest: +SKIP
        >>> report.contender("engine").accuracy.share()  # doctest: +SKIP
    """
    progress = progress or Silent()
    built = ([engines] if engines is not None else []) + list(not_run)
    artifacts, strangers = trace_artifacts(original, model_name(original), checkpoint, onnx, built)
    every = load_evaluation(evaluation)
    samples = every[:limit]
    if not samples:
        raise CalibrationError(f"'{evaluation}' holds no question.", "Add questions with answers, or raise the limit.")
    recipe = load_checkpoint_recipe(checkpoint)
    check_decoding(str(checkpoint))
    engine = None
    if engines is not None:
        engine = VisionLanguageEngine.load(engines, accuracy_level=0, plugin_library=plugin_library)
    calibration, shuffled = calibration_of(recipe), shuffle_pictures(samples)
    found = evaluate(original, checkpoint, engine, Questions(samples, shuffled, calibration), progress)
    del engine  # its memory is for the processes that measure speed
    latency: list[Latency] = []
    if engines is not None:
        latency = measure_latency(
            engines, samples[0], original=original, plugin_library=plugin_library, progress=progress
        )
    notes = [*strangers, *_gaps(calibration, shuffled)]
    notes += [LIMITED.format(count=len(samples))] if len(samples) < len(every) else []
    notes += [busy] if latency and (busy := busy_note()) else []
    inputs = _Inputs(original, checkpoint, engines, onnx, tuple(not_run), evaluation, samples, recipe)
    return _report(inputs, found, latency, artifacts, notes)


def _gaps(calibration: list[Sample] | None, shuffled: list[Sample] | None) -> list[str]:
    """Return a note on each part of a report that is missing."""
    return [*([] if calibration else [NO_CALIBRATION]), *([] if shuffled else [NO_SHUFFLE])]


@dataclass(frozen=True)
class _Inputs:
    """Inputs of a report: the arguments of `validate`, the questions that were asked, and the recipe."""

    original: str
    checkpoint: Path
    engines: Path | None
    onnx: Path | None
    not_run: tuple[Path, ...]
    evaluation: str
    samples: list[Sample]
    recipe: Recipe


def _report(
    inputs: _Inputs, found: Evaluation, latency: list[Latency], artifacts: list[Artifact], notes: list[str]
) -> Report:
    """Put all results into one report."""
    samples, compared, answers = inputs.samples, found.compared, found.answers
    sizes = stage_sizes(found.source, inputs.checkpoint, inputs.onnx, inputs.engines)
    data = EvaluationData(
        source=inputs.evaluation,
        samples=len(samples),
        kinds=dict(Counter(sample.kind for sample in samples)),
        sha256=hash_samples(samples),
    )
    return Report(
        qe_edge=VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model_name(inputs.original),
        model_type=found.model_type,
        recipe=inputs.recipe.model_dump(mode="json"),
        artifacts=artifacts,
        machine=describe_machine(),
        evaluation=data,
        bits=found.bits,
        sizes=sizes,
        layers=compared.layers,
        stream=compared.stream,
        routing=compared.routing,
        contenders=[
            _contender(
                role, _runtime(role, inputs.engines), compared, sizes, samples, answers[role], found.blind.get(role)
            )
            for role in answers
        ],
        engine=_agreement(compared, answers),
        latency=latency,
        targets=target_states(inputs.engines, inputs.not_run),
        examples=choose_examples(samples, answers),
        notes=notes,
    )


def model_name(reference: str) -> str:
    """Return a model's name in reports. It is no path, because a path says nothing on another machine.

    Example:
        >>> model_name("demo"), model_name("HuggingFaceTB/SmolVLM2-256M-Video-Instruct")
        ('demo', 'HuggingFaceTB/SmolVLM2-256M-Video-Instruct')
        >>> Path("models/my-model").mkdir(parents=True)
        >>> model_name("models/my-model")
        'my-model'
    """
    folder = Path(reference)
    if reference == DEMO or (folder.is_dir() and folder.samefile(model_path())):
        return DEMO
    return folder.resolve().name if folder.is_dir() else reference


def calibration_of(recipe: Recipe) -> list[Sample] | None:
    """The samples that a checkpoint was calibrated on, or None if they cannot be had again unchanged.

    Example:
        >>> recipe = Recipe.model_validate({"calibration": {"source": "demo", "samples": 8}})
        >>> len(calibration_of(recipe))
        8
    """
    spec = recipe.calibration
    try:
        samples = load_samples(spec.source, spec.samples, recipe.seed)
    except CalibrationError:
        return None
    return samples if spec.sha256 in (None, hash_samples(samples)) else None


def _runtime(role: Role, engines: Path | None) -> str:
    """Return the name of a model's runtime with its precision."""
    if role != "engine" or engines is None:
        return "PyTorch, float32"
    name = runtime_name(read_engine_info(engines))
    return f"{name}, accuracy level 0" if name == "ONNX Runtime" else name


def _contender(
    role: Role,
    runtime: str,
    compared: Comparisons,
    sizes: Sequence[FileSize],
    samples: Sequence[Sample],
    answers: Sequence[str],
    blind: Sequence[str] | None,
) -> Contender:
    distance = compared.distances.get(role)
    return Contender(
        role=role,
        runtime=runtime,
        accuracy=score(samples, answers),
        shuffled=None if blind is None else score(samples, blind),
        answer_tokens=None if distance is None else distance_of(distance.answer),
        text_tokens=None if distance is None else distance_of(distance.text),
        size=model_size(sizes, role),
    )


def _agreement(compared: Comparisons, answers: Mapping[Role, Sequence[str]]) -> EngineAgreement | None:
    if compared.engine_error is None:
        return None
    pairs = list(zip(answers["quantized"], answers["engine"], strict=True))
    return EngineAgreement(
        same_answers=sum(one == other for one, other in pairs) / len(pairs),
        logits_error=compared.engine_error,
    )
