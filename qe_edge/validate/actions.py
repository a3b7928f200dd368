"""Error of a robot's actions: a quantized model, and the engine built from it, against the original on the same noise.

Every model makes the actions of a question of the same noise, so that they are the same without quantization. The error
of a question is the length of the difference of its normalized actions, relative to the original's. Every number of a
robot counts alike then, whatever its unit.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from qe_edge.budget.accounting import ModelBits, count_bits
from qe_edge.calibration.sources import hash_samples, load_evaluation
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.models.quantized import load_quantized
from qe_edge.recipes.stored import load_checkpoint_recipe
from qe_edge.runtime.actions import ActionEngine, noise_of
from qe_edge.runtime.generation import check_finite
from qe_edge.system.errors import CalibrationError
from qe_edge.system.heap import trim_heap
from qe_edge.system.progress import Progress, Silent, track
from qe_edge.system.version import VERSION
from qe_edge.validate.artifacts import trace_artifacts
from qe_edge.validate.run import LIMITED, model_name
from qe_edge.validate.schema import Artifact
from qe_edge.validate.subjects import block_groups, decode_layers, in_float32, load_float32

BATCH = 4
REPORT_KIND: Literal["actions"] = "actions"


class Actor(Protocol):
    """A model whose actions are compared.

    Example:
        >>> actor: Actor = TorchActor(load_quantized("checkpoint"))  # doctest: +SKIP
    """

    def actions(self, encoded: Encoded, noise: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Normalized actions float32 `[batch, chunk, width]` that are made of the noise."""


class TorchActor:
    """transformers' own class as an actor; it computes in the precision of its weights.

    Args:
        loaded: The model.
        name: Its name in messages.

    Example:
        >>> actor = TorchActor(load_float32("my-pi0"), "the original model")  # doctest: +SKIP
    """

    def __init__(self, loaded: LoadedModel, name: str = "the model") -> None:
        self._loaded = loaded
        self._name = name

    def actions(self, encoded: Encoded, noise: np.ndarray, steps: int | None = None) -> np.ndarray:
        """As `ActionEngine.actions`.

        Raises:
            NumericalError: If the actions are not finite.
        """
        model: Any = self._loaded.model
        inputs = self._loaded.family.torch_inputs(encoded)
        found: np.ndarray = model.sample_actions(**inputs, noise=torch.from_numpy(noise), num_steps=steps).numpy()
        check_finite(found, f"The actions of {self._name}")
        return found


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ActionErrors(_Strict):
    """Relative errors of the actions over all questions.

    Attributes:
        mean: Their mean.
        median: Their median.
        worst: The largest.
    """

    mean: float
    median: float
    worst: float


class ActionQuestion(_Strict):
    """One question.

    Attributes:
        task: What the robot is to do.
        cameras: Number of pictures.
        quantized: Relative error of the quantized model's actions.
        engine: Of the engine's, None without one.
    """

    task: str
    cameras: int
    quantized: float
    engine: float | None


class ActionReport(_Strict):
    """Everything that was measured.

    Attributes:
        kind: What tells this file from the report of a model that writes text.
        qe_edge: Version that wrote it.
        created: Date and time.
        model: Name of the original.
        model_type: Its family.
        recipe: The checkpoint's recipe.
        artifacts: The folders that were measured.
        bits: Bits per weight of the checkpoint.
        source: Source of the questions.
        sha256: Hash of the questions.
        steps: Steps of denoising.
        quantized: Errors of the quantized model.
        engine: Of the engine, None without one.
        engine_to_quantized: Of the engine, relative to the quantized model in PyTorch.
        questions: The questions one by one.
        notes: What a reader should know.
    """

    kind: Literal["actions"] = REPORT_KIND
    qe_edge: str
    created: str
    model: str
    model_type: str
    recipe: dict[str, Any]
    artifacts: list[Artifact]
    bits: ModelBits
    source: str
    sha256: str
    steps: int
    quantized: ActionErrors
    engine: ActionErrors | None
    engine_to_quantized: ActionErrors | None
    questions: list[ActionQuestion]
    notes: list[str]


@dataclass(frozen=True)
class _Measured:
    bits: ModelBits
    model_type: str
    steps: int
    actions: dict[str, np.ndarray]


def validate_actions(
    original: str,
    checkpoint: Path,
    engines: Path | None,
    evaluation: str,
    *,
    onnx: Path | None = None,
    plugin_library: Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ActionReport:
    """Compare the actions of a quantized checkpoint, and of the engine built from it, with the original model's.

    Args:
        original: The original model: a folder or a hub id.
        checkpoint: Folder of the quantized checkpoint.
        engines: Folder of one target's engine, or None to leave the engine out.
        evaluation: Source of held-out samples with pictures, a task and a state.
        onnx: Folder of the exported graphs, to be checked; None leaves them out.
        plugin_library: For engines with the plugin: its library, None for the one that is found.
        limit: Use only the first samples; None uses all.
        progress: Where to report progress.

    Raises:
        ArtifactError: If the folders were not made from each other. This is checked before any work.
        CalibrationError: If there is no sample.
        InputError: If a sample cannot be used.
        NumericalError: If actions are not finite.

    Example:
        >>> report = validate_actions("my-pi0", Path("checkpoint"), None, "held_out.jsonl")  # doctest: +SKIP
        >>> report.quantized.worst  # doctest: +SKIP
    """
    built = [] if engines is None else [engines]
    artifacts, notes = trace_artifacts(original, model_name(original), checkpoint, onnx, built)
    every = load_evaluation(evaluation)
    samples = every[:limit]
    if not samples:
        raise CalibrationError(f"'{evaluation}' holds no sample.", "Add samples, or raise the limit.")
    notes += [LIMITED.format(count=len(samples))] if len(samples) < len(every) else []
    engine = None if engines is None else ActionEngine.load(engines, plugin_library=plugin_library)
    found = _measure(original, checkpoint, engine, samples, progress or Silent())
    return ActionReport(
        qe_edge=VERSION,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model_name(original),
        model_type=found.model_type,
        recipe=load_checkpoint_recipe(checkpoint).model_dump(mode="json"),
        artifacts=artifacts,
        bits=found.bits,
        source=evaluation,
        sha256=hash_samples(samples),
        steps=found.steps,
        notes=notes,
        **_compared(found.actions, samples),
    )


def _compared(actions: dict[str, np.ndarray], samples: Sequence[Sample]) -> dict[str, Any]:
    """The errors of a report: of all questions, and one by one."""
    quantized = action_errors(actions["original"], actions["quantized"])
    engine = action_errors(actions["original"], actions["engine"]) if "engine" in actions else None
    questions = [
        ActionQuestion(
            task=sample.question,
            cameras=len(sample.pictures),
            quantized=float(quantized[number]),
            engine=None if engine is None else float(engine[number]),
        )
        for number, sample in enumerate(samples)
    ]
    apart = None if engine is None else _summed(action_errors(actions["quantized"], actions["engine"]))
    return {
        "quantized": _summed(quantized),
        "engine": None if engine is None else _summed(engine),
        "engine_to_quantized": apart,
        "questions": questions,
    }


def action_errors(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Relative error of every question, `[questions]`, of actions `[questions, chunk, numbers]`.

    Example:
        >>> wanted = np.array([[[3.0, 4.0]], [[0.0, 2.0]]])
        >>> action_errors(wanted, wanted + np.array([[[0.0, 0.5]], [[0.0, 0.0]]])).tolist()
        [0.1, 0.0]
    """
    apart, size = (np.sqrt(np.square(part, dtype=np.float64).sum((1, 2))) for part in (found - wanted, wanted))
    errors: np.ndarray = apart / np.maximum(size, np.finfo(np.float32).tiny)
    return errors


def _measure(
    original: str,
    checkpoint: Path,
    engine: ActionEngine | None,
    samples: Sequence[Sample],
    progress: Progress,
) -> _Measured:
    """The actions of all models. At most one of them is held in float32."""
    quantized = load_quantized(checkpoint)
    family = quantized.family
    for sample in samples:  # a mistake is said before the original is loaded
        family.encode(quantized.processor, [sample])
    bits = count_bits(quantized.model, block_groups(quantized))
    numbers, processor = len(quantized.processor.actions.mean), quantized.processor
    actions: dict[str, np.ndarray] = {}
    shape = (family.config.chunk_size, family.config.max_action_dim)
    roles = 2 if engine is None else 3
    with track(progress, "Validating", roles * len(samples)) as tracked:

        def collect(role: str, actor: Actor) -> None:
            made = []
            for start in range(0, len(samples), BATCH):
                part = samples[start : start + BATCH]
                noise = noise_of(shape, range(start, start + len(part)))
                made.append(actor.actions(family.encode(processor, part), noise)[:, :, :numbers])
                tracked.advance(len(part), f"actions of the {role}")
            actions[role] = np.concatenate(made)

        reference = load_float32(original)
        collect("original", TorchActor(reference, "the original model"))
        del reference
        _give_back()
        in_float32(quantized)
        decode_layers(quantized)
        collect("quantized", TorchActor(quantized, "the quantized model"))
        del quantized
        _give_back()
        if engine is not None:
            collect("engine", engine)
    return _Measured(bits, family.model_type, family.config.num_inference_steps, actions)


def _summed(errors: np.ndarray) -> ActionErrors:
    return ActionErrors(mean=float(errors.mean()), median=float(np.median(errors)), worst=float(errors.max()))


def _give_back() -> None:
    """Return the memory of a model that is no longer used to the system."""
    gc.collect()
    trim_heap()
