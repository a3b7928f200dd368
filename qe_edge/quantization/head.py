"""The language model's head, rounded to nearest on a grid of its own: most of what a small model reads for a token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qe_edge.layers.linear import QELinear, QuantizedLinear
from qe_edge.models.exactness import note_own_head
from qe_edge.models.groups import set_module
from qe_edge.models.loading import LoadedModel
from qe_edge.numerics.grids import WeightGrid, quantize_weight
from qe_edge.system.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = "Leave --head out."


def head_of(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Dotted name and layer of a model's head.

    Raises:
        RecipeError: If there is none.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise RecipeError("The model has no head that could be quantized.", REMEDY)
    return next(name for name, module in model.named_modules() if module is head), head


def quantize_head(loaded: LoadedModel, grid: WeightGrid) -> None:
    """Replace the head by one of integer codes, in place; an embedding that was the same matrix stays as it is.

    Its input is not rounded, whatever the scheme of the other layers.

    Args:
        loaded: The model; its head is in memory.
        grid: Grid of the weight.

    Raises:
        RecipeError: If the model has no head.
    """
    name, head = head_of(loaded.model)
    weight = quantize_weight(head.weight.detach(), grid)
    set_module(loaded.model, name, QELinear(QuantizedLinear(weight, 0), head.bias))
    note_own_head(loaded.model, loaded.family)
