"""The part of a validation that runs the models. At most one of them is held in float32.

The original answers first. It stays in memory while the quantized model is compared with it, layer by layer. During
this comparison quantized layers decode their weights at every call, and both models share the tensors that were not
quantized. Then the original is freed, and the quantized model keeps its weights decoded while it answers. The result
holds no model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qe_edge.budget.accounting import ModelBits, count_bits
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.models.quantized import load_quantized
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import ArtifactError, CalibrationError
from qe_edge.system.heap import trim_heap
from qe_edge.system.progress import Progress, track
from qe_edge.validate.answers import BATCH, Reader, answer_all, answer_length
from qe_edge.validate.comparison import Comparison, TeacherForced
from qe_edge.validate.metrics import RelativeError
from qe_edge.validate.schema import LayerErrors, Role, RoutingLoad, StreamErrors
from qe_edge.validate.subjects import Subject, TorchSubject, block_groups, decode_layers, in_float32, load_float32


@dataclass(frozen=True)
class Questions:
    """The questions that all models are asked.

    Attributes:
        heldout: Questions with answers.
        shuffled: The same questions with exchanged pictures, or None.
        calibration: The samples that the checkpoint was calibrated on, or None.
    """

    heldout: Sequence[Sample]
    shuffled: Sequence[Sample] | None
    calibration: Sequence[Sample] | None


@dataclass(frozen=True)
class Comparisons:
    """Results of running the models side by side.

    Attributes:
        layers: Errors of every quantized layer.
        stream: Errors of the hidden states behind every block.
        routing: Load of the routed experts.
        distances: Distance of the predictions of "quantized" and "engine" from the original's.
        engine_error: Relative error of the engine's logits, None without one.
    """

    layers: list[LayerErrors]
    stream: list[StreamErrors]
    routing: list[RoutingLoad]
    distances: dict[Role, TeacherForced]
    engine_error: float | None


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured on the models themselves.

    Attributes:
        source: Folder or hub id of the original.
        model_type: Model type of the original, for example "qwen2_vl".
        bits: Bits per weight of the checkpoint.
        compared: Results of running them side by side.
        answers: Answers to the held-out questions.
        blind: Answers to the questions with exchanged pictures; empty without those.
    """

    source: str
    model_type: str
    bits: ModelBits
    compared: Comparisons
    answers: dict[Role, list[str]]
    blind: dict[Role, list[str]]


def evaluate(
    original: str,
    checkpoint: Path,
    engine: VisionLanguageEngine | None,
    questions: Questions,
    progress: Progress,
) -> Evaluation:
    """Compare the models and collect their answers.

    Args:
        original: The original model: "demo", a folder or a hub id.
        checkpoint: Folder of the quantized checkpoint.
        engine: The engine built from it, or None.
        questions: The questions.
        progress: Where to report progress.

    Raises:
        NumericalError: If outputs are not finite.
        QEError: If a model cannot be loaded, or cannot be decoded as its settings say.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation  # doctest: +SKIP
        >>> from qe_edge.system.progress import Silent  # doctest: +SKIP
        >>> questions = Questions(load_evaluation("demo"), None, None)  # doctest: +SKIP
        >>> evaluate("demo", Path("checkpoint"), None, questions, Silent()).answers["quantized"][:3]  # doctest: +SKIP
    """
    quantized = load_quantized(checkpoint)  # first: while it is opened it takes as much as an unquantized one
    bits = count_bits(quantized.model, block_groups(quantized))
    _give_back()
    settings = TorchSubject(quantized).settings
    if engine is not None and engine.manifest.generation != settings:
        raise ArtifactError(
            "The engine and the checkpoint decode by different generation settings.", "Export and build it again."
        )
    reference = load_float32(original)
    in_float32(quantized, like=reference, decoded=False)
    source, model_type = reference.source, reference.family.model_type
    rounds = 2 if questions.shuffled else 1
    work = len(questions.heldout) * (1 + rounds * (2 if engine is None else 3)) + len(questions.calibration or [])
    answers: dict[Role, list[str]] = {}
    blind: dict[Role, list[str]] = {}
    with track(progress, "Validating", work) as tracked:
        ask = _asker(Reader(reference.family, reference.processor), questions.heldout, tracked)

        def collect(role: Role, subject: Subject) -> None:
            answers[role] = ask(role, subject, questions.heldout)
            if questions.shuffled:
                blind[role] = ask(role, subject, questions.shuffled)

        collect("original", TorchSubject(reference, settings, "the original model"))
        compared = _compare(reference, quantized, engine, questions, tracked)
        del reference
        _give_back()
        decode_layers(quantized)
        collect("quantized", TorchSubject(quantized, settings, "the quantized model"))
        del quantized
        _give_back()
        if engine is not None:
            collect("engine", engine)
    return Evaluation(source, model_type, bits, compared, answers, blind)


def _compare(
    reference: LoadedModel,
    quantized: LoadedModel,
    engine: VisionLanguageEngine | None,
    questions: Questions,
    progress: Progress,
) -> Comparisons:
    """Run the models side by side. The result holds none of them."""
    comparison = Comparison(reference, quantized, engine, _batch(engine))
    comparison.measure_heldout(questions.heldout, lambda count: progress.advance(count, "logits and layers"))
    if questions.calibration:
        comparison.measure_calibration(questions.calibration, lambda count: progress.advance(count, "layers"))
    return Comparisons(
        comparison.layer_errors(),
        comparison.stream_errors(),
        comparison.routing_loads(),
        comparison.distances,
        None if engine is None else _known(comparison.engine_error),
    )


def _batch(engine: VisionLanguageEngine | None) -> int:
    """Samples of a batch: GPU engines take few pictures at a time."""
    return BATCH if engine is None or engine.limits is None else 1


def _known(error: RelativeError) -> float:
    """An error that was measured; outputs that are zero in both models are equal."""
    value = error.value()
    if not error.rows:
        raise CalibrationError("The engine was asked nothing.", "Give held-out samples with at least one token.")
    return 0.0 if value is None else value


def _asker(
    reader: Reader, samples: Sequence[Sample], progress: Progress
) -> Callable[[Role, Subject, Sequence[Sample]], list[str]]:
    """A function that collects a model's answers, all models under the same limit of tokens."""
    length = answer_length(reader, samples)

    def ask(role: Role, subject: Subject, questions: Sequence[Sample]) -> list[str]:
        return answer_all(
            subject,
            reader,
            questions,
            length,
            lambda count: progress.advance(count, f"answers of the {role}"),
            _batch(subject) if isinstance(subject, VisionLanguageEngine) else BATCH,
        )

    return ask


def _give_back() -> None:
    """Return the memory of a model that is no longer used to the system."""
    gc.collect()
    trim_heap()
