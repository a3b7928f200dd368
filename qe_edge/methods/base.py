"""What every quantization method receives and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from qe_edge.budget.model import AdapterSize, Candidate
from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.reconstruction.problem import LinearProblem


class MethodOptions(BaseModel):
    """Base of a method's own options; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Method(ABC):
    """A quantization method with its resolved options.

    Class attributes:
        Options: The pydantic model of the method's options.
        presets: Named sets of option values; "default" always exists.
        on_device: Whether problems may lie on a device; others are brought to the CPU's memory.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    on_device: ClassVar[bool] = False

    def __init__(self, options: MethodOptions) -> None:
        self.options = options

    @property
    def stack_siblings(self) -> bool:
        """Whether layers that read the same input are handed over as one stacked problem."""
        return False

    @property
    def needs_gradients(self) -> bool:
        """Whether gradients of the loss are to be measured on the original model before the first layer."""
        return False

    def adapter_size(self, out_features: int, in_features: int) -> AdapterSize:  # noqa: ARG002 - for subclasses
        """Ranks and experts for a layer of this shape, as far as they are known before calibration; none by default."""
        return AdapterSize()

    def rotates(self, modules: Sequence[str], *, budget: bool) -> bool:  # noqa: ARG002 - for subclasses
        """Whether the language model is rotated before anything is measured on it (`models.rotation`).

        Args:
            modules: Those that are quantized.
            budget: Whether a budget is spent.
        """
        return False

    @abstractmethod
    def request(self, out_features: int, in_features: int) -> StatisticsRequest | None:
        """What to measure on the calibration input of a layer of this shape; None for no calibration."""

    @abstractmethod
    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Quantize one linear problem.

        Raises:
            NumericalError: If weights or statistics are not finite.
        """

    @property
    def spends_budget(self) -> bool:
        """Whether the method offers candidates for a bit budget."""
        return type(self).candidates is not Method.candidates

    def candidates(self, problem: LinearProblem) -> list[Candidate]:
        """Everything that a budget may choose from for one linear problem; only where `spends_budget`."""
        raise NotImplementedError(f"'{problem.name}': this method has no candidates")
