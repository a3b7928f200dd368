"""A quantization with every choice resolved once: model, recipe and calibration samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from qe_edge.calibration.sources import hash_samples, load_samples, samples_from_python
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.fingerprints import model_parts
from qe_edge.models.loading import LoadedModel
from qe_edge.quantization.run_record import Record, make_record
from qe_edge.recipes.recipe import Recipe
from qe_edge.system.errors import CalibrationError

BATCH = 8  # calibration samples per forward pass
FROM_PYTHON = "samples passed from Python"  # the source that a recipe names for them


@dataclass(frozen=True)
class Job:
    """A quantization with every choice made; later stages take it as it is, and resolve nothing again.

    Attributes:
        model: "demo", a folder, a hub id, or a model in memory.
        recipe: The resolved recipe: all options written out, and the hash of the calibration data.
        samples: The calibration samples, at least one.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> job = make_job("demo", make_recipe(method="rtn", calibration={"samples": 2}))
        >>> len(job.samples), job.recipe.calibration.source, len(job.recipe.calibration.sha256)
        (2, 'demo', 64)
    """

    model: str | LoadedModel
    recipe: Recipe
    samples: tuple[Sample, ...]

    @cached_property
    def parts(self) -> dict[str, str]:
        """A hash of every part of the model; it is computed once, at about 2 GB/s.

        Raises:
            ModelError: If there is no such model.
        """
        return model_parts(self.model)

    def record(self, environment: Mapping[str, object] | None = None) -> Record:
        """All inputs of the result; with an environment, the result depends on them to the last bit.

        Raises:
            ModelError: If there is no such model.
        """
        return make_record(self.parts, self.recipe, environment)


def make_job(model: str | LoadedModel, recipe: Recipe, calibration: str | Sequence[Sample] | None = None) -> Job:
    """Resolve a quantization: the samples are drawn and opened, and the recipe is completed.

    Args:
        model: "demo", a folder, a hub id, or a model in memory.
        recipe: The recipe.
        calibration: Name of a source, or the samples themselves; None takes the recipe's source.

    Raises:
        CalibrationError: If there is no sample, or one cannot be used.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> job = make_job("demo", make_recipe(method="gptq"), calibration=[Sample(None, "Is it red?", "no")])
        >>> job.recipe.calibration.source, job.recipe.options
        ('samples passed from Python', {'damping': 0.01})
    """
    drawn = recipe.calibration
    if calibration is None or isinstance(calibration, str):
        source = calibration or drawn.source
        samples = load_samples(source, drawn.samples, recipe.seed, asked=drawn.asks)
    else:
        source, samples = FROM_PYTHON, samples_from_python(calibration)
    if not samples:
        raise CalibrationError("There is no calibration sample.", "Pass at least one picture with a question, or text.")
    spec = drawn.model_copy(update={"source": source, "samples": len(samples), "sha256": hash_samples(samples)})
    return Job(model, recipe.resolved().model_copy(update={"calibration": spec}), tuple(samples))


def encoded_batches(loaded: LoadedModel, samples: Sequence[Sample]) -> list[Encoded]:
    """Samples with their answers, `BATCH` at a time.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> batches = encoded_batches(load_model("demo"), load_samples("demo", 10))
        >>> [len(batch.input_ids) for batch in batches]
        [8, 2]
    """
    starts = range(0, len(samples), BATCH)
    return [loaded.family.encode(loaded.processor, samples[start : start + BATCH], answers=True) for start in starts]
