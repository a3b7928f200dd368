"""The language model's head on a grid of its own. In a small model it is most of the bytes that a token reads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.layers.linear import QELinear, QuantizedLinear
from qe_edge.models.exactness import note_own_head
from qe_edge.models.groups import set_module
from qe_edge.models.loading import LoadedModel
from qe_edge.models.rotation import last_norm
from qe_edge.numerics.grids import QuantizedWeight, WeightGrid
from qe_edge.reconstruction.gptq import Hessian, gptq_round
from qe_edge.system.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REMEDY = "Leave --head out."
DAMPING = 0.01  # of GPTQ, relative to the mean of the Gram matrix's diagonal
ROWS = 1 << 14  # tokens of the vocabulary that are rounded at a time


def head_of(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Dotted name and layer of a model's head.

    Raises:
        RecipeError: If there is none, or no norm before it.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> name, head = head_of(load_model("demo").model)
        >>> name, head.in_features
        ('lm_head', 256)
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or last_norm(model) is None:
        raise RecipeError("The model has no head that could be quantized.", REMEDY)
    return next(name for name, module in model.named_modules() if module is head), head


def quantize_head(loaded: LoadedModel, grid: WeightGrid, hidden: Sequence[Tensor], valid: Sequence[np.ndarray]) -> None:
    """Replace the head by a head with integer codes, in place. An embedding that was the same matrix stays as it is.

    GPTQ rounds it on the hidden states of the calibration samples. Its input is not rounded, whatever the scheme of the
    other layers.

    Args:
        loaded: The model.
        grid: Grid of the weight.
        hidden: Output of the last decoder layer for every batch of samples, `[batch, sequence, hidden]`.
        valid: Mask of every batch, `[batch, sequence]`, 0 on padding.

    Raises:
        RecipeError: If the model has no head.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> hidden, valid = [torch.randn(2, 50, 256)], [np.ones((2, 50))]  # of calibration samples
        >>> quantize_head(loaded, WeightGrid(4, group_size=32), hidden, valid)
        >>> loaded.model.lm_head.weight_bits
        4
    """
    name, head = head_of(loaded.model)
    hessian = Hessian(_gram(loaded.model, hidden, valid))
    weight = loaded.stored.value(f"{name}.weight", head.weight)
    parts = [
        gptq_round(weight[start : start + ROWS].float(), hessian, grid, DAMPING, clip=True)
        for start in range(0, len(weight), ROWS)
    ]
    codes = QuantizedWeight(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scales for part in parts]),
        None,
        grid.bits,
        parts[0].group_size,
    )
    set_module(loaded.model, name, QELinear(QuantizedLinear(codes, 0), head.bias))
    note_own_head(loaded.model, loaded.family)


def _gram(model: PreTrainedModel, hidden: Sequence[Tensor], valid: Sequence[np.ndarray]) -> np.ndarray:
    """Gram matrix float64 `[hidden, hidden]` of the head's inputs."""
    stored, gram = last_norm(model), None
    if stored is None:
        raise RecipeError("The model has no norm before its head.", REMEDY)
    norm = copy.deepcopy(stored).float()  # a rotated model's norm ends in a product
    for states, mask in zip(hidden, valid, strict=True):
        with torch.no_grad():
            inputs = norm(states.float())[torch.from_numpy(mask.astype(bool))].double().numpy()
        product = inputs.T @ inputs
        gram = product if gram is None else gram + product
    if gram is None:
        raise RecipeError("No calibration sample reaches the head.", "Give samples with text.")
    found: np.ndarray = gram
    return found
