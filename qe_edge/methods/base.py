"""The interface of a quantization method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

import numpy as np
from pydantic import BaseModel, ConfigDict

from qe_edge.budget.model import AdapterSize, Candidate
from qe_edge.budget.sizes import empty_linear
from qe_edge.calibration.statistics import StatisticsRequest
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.problem import LinearProblem


class MethodOptions(BaseModel):
    """Base of a method's own options; unknown keys are errors.

    Class attributes:
        renamed: Earlier names of options, which are still read.
        renamed_values: By option, earlier names of its values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}
    renamed_values: ClassVar[dict[str, dict[str, str]]] = {}

    @classmethod
    def respelled(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Options with the names that they have now; a new name wins over its earlier one."""
        current: dict[str, Any] = {}
        for name, value in sorted(values.items(), key=lambda item: item[0] not in cls.renamed):
            key = cls.renamed.get(name, name)
            known = cls.renamed_values.get(key, {})
            current[key] = known.get(value, value) if isinstance(value, str) else value
        return {name: current[name] for name in (cls.renamed.get(name, name) for name in values)}


OptionsType = TypeVar("OptionsType", bound=MethodOptions)


class Method(ABC, Generic[OptionsType]):
    """A quantization method with its resolved options.

    Class attributes:
        Options: The pydantic model of the method's options; it is the one in the brackets of `Method[...]`.
        presets: Named sets of option values; "default" always exists.
        needs_gradients: Whether gradients of the loss are measured on the original model before the first layer.
        on_device: Whether problems may lie on a device; others are brought to the CPU's memory.

    Example:
        >>> class Nearest(Method[MethodOptions]):
        ...     def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        ...         weight = quantize_weight(problem.weight, problem.scheme.weight)
        ...         return QuantizedLinear(weight, problem.scheme.activation_bits)
        >>> Nearest(MethodOptions()).request(out_features=8, in_features=8) is None
        True
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {"default": {}}
    needs_gradients: ClassVar[bool] = False
    on_device: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Take the options from the brackets of the base class, unless the class names them itself."""
        super().__init_subclass__()
        if "Options" in cls.__dict__:
            return
        for base in getattr(cls, "__orig_bases__", ()):
            origin, given = get_origin(base), get_args(base)
            if isinstance(origin, type) and issubclass(origin, Method) and isinstance(given[0], type):
                cls.Options = given[0]

    def __init__(self, options: OptionsType) -> None:
        self.options = options

    @property
    def needs(self) -> StatisticsRequest | None:
        """Statistics of every layer's calibration input that the method needs; None for no calibration."""
        return None

    @property
    def weighs_tokens(self) -> bool:
        """Whether `token_weights` weighs the tokens of Gram matrices, by gradients of the predictions."""
        return False

    def token_weights(self, energy: np.ndarray) -> np.ndarray:
        """Weights `[tokens]`, mean 1, of a layer's tokens.

        Args:
            energy: `[tokens]` squared gradients of the loss at the outputs that read them.
        """
        return np.ones_like(energy)

    @property
    def sees_both_models(self) -> bool:
        """Whether layers are quantized one after the other, on the quantized model's inputs and with `drift`."""
        return False

    @property
    def sees_attention(self) -> bool:
        """Whether problems of query, key and value layers have `heads`: what their errors do to an attention."""
        return False

    @property
    def trains_model(self) -> bool:
        """Whether all layers of a model are trained together (`methods.training`), and no block is walked."""
        return False

    @property
    def weighs_norms(self) -> bool:
        """Whether tokens of layers that write into the residual stream are weighed by the norm that follows."""
        return False

    @property
    def stack_siblings(self) -> bool:
        """Whether layers that read the same input are handed over as one stacked problem."""
        return False

    def adapter_size(self, out_features: int, in_features: int) -> AdapterSize:
        """Ranks and experts for a layer of this shape, as far as they are known before calibration; none by default."""
        del out_features, in_features  # for subclasses
        return AdapterSize()

    @property
    def torch_only(self) -> str:
        """Why a result cannot become a graph, as "its ...", for methods that use `TorchParts`; "" where it can."""
        return ""

    def empty(self, out_features: int, in_features: int, scheme: Scheme) -> QuantizedLinear:
        """A result of this shape without data, on the meta device; a dry run counts its bits."""
        return empty_linear(out_features, in_features, scheme, self.adapter_size(out_features, in_features))

    def rotates(self, modules: Sequence[str], *, budget: bool) -> bool:
        """Whether the language model is rotated before anything is measured on it (`models.rotation`).

        Args:
            modules: Parts of the model that are quantized.
            budget: Whether a budget is spent.
        """
        del modules, budget  # for subclasses
        return False

    def request(self, out_features: int, in_features: int) -> StatisticsRequest | None:
        """Statistics to measure for a layer of this shape: `needs`, unless the method's need depends on the shape."""
        del out_features, in_features  # for subclasses
        return self.needs

    def check_shape(self, name: str, out_features: int, in_features: int) -> None:
        """Refuse a layer of a shape that the method cannot take; called before anything is measured.

        Raises:
            RecipeError: Naming the layer; never by default.
        """

    def check_scheme(self, scheme: Scheme) -> None:
        """Refuse a scheme that the method cannot round to; called when a recipe is made.

        Raises:
            RecipeError: Naming the scheme; never by default.
        """

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
        """The candidates that a budget may choose from for one linear problem; only where `spends_budget`."""
        # only a mistake in our own code comes here: a recipe with a budget for such a method is refused
        raise NotImplementedError(f"'{problem.name}': this method has no candidates")
