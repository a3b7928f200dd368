"""Which numbers a quantized layer can hold: what goes into a method is checked before, what comes out of it after.

One rule for single layers and whole models. Weights and tokens are finite. The scales of the weights are float16, so
weights beyond their largest value are refused; so are layers of weights so small that they would all become zero. A
few small rows or groups beside large ones may become zero: they are below the rounding of the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.torch_parts import PART_TENSORS
from qe_edge.numerics.grids import MIN_RANGE, SCALE_DTYPE, WeightGrid, rounds_activations, split_groups
from qe_edge.system.errors import NumericalError

LARGEST_TOKEN = 1e9  # |x| up to which no sum of squares over outputs leaves float32, whatever the weights
SMALLEST_TOKEN = 1e-10  # max |x| from which squares of outputs are ordinary numbers of float32
LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max
LOST_ENERGY = 1e-4  # share of a layer's squared weights that may become zero: a hundredth of what rounding costs


def check_weight(name: str, weight: Tensor, grid: WeightGrid) -> None:
    """Refuse a weight that a grid cannot hold.

    Args:
        name: Of the layer, for messages.
        weight: `[out, in]`, any float dtype that has a minimum.
        grid: Bits, group size and symmetry.

    Raises:
        NumericalError: For NaN, infinity, weights beyond float16 scales, and weights that would become zero.
    """
    groups = split_groups(weight, grid)
    smallest, largest = groups.amin(-1).float(), groups.amax(-1).float()
    if not bool((torch.isfinite(smallest) & torch.isfinite(largest)).all()):
        raise NumericalError(
            f"The weights '{name}' hold NaN or infinity.",
            "The checkpoint is damaged or diverged in training; get a sound one.",
        )
    low, high = grid.limits
    top = torch.maximum(-smallest, largest)
    if grid.symmetric:
        steps, spans = high, top
    else:  # halved, so that the largest numbers of float32 do not overflow
        steps, spans = high - low, 2 * (largest.clamp_min(0) / 2 - smallest.clamp_max(0) / 2).clamp_max(1e38)
    if float(spans.max()) >= LARGEST_SCALE * steps:
        raise NumericalError(
            f"The weights '{name}' reach {float(top.max()):.3g}, beyond the float16 scales of {grid.bits}-bit codes, "
            f"which cover {LARGEST_SCALE * steps:.3g}.",
            _rescale("Divide"),
        )
    tiny = (spans > 0) & (spans < MIN_RANGE)
    if bool(tiny.any()) and _share(groups, tiny, float(top.max())) > LOST_ENERGY:
        raise NumericalError(
            f"The weights '{name}' are at most {float(top.max()):.3g}, and most of them would become zero: the float16 "
            f"scales of {grid.bits}-bit codes begin at weights of {MIN_RANGE:g}.",
            _rescale("Multiply"),
        )


def check_tokens(name: str, largest: float, activation_bits: int = 0) -> None:
    """Refuse calibration tokens whose squares cannot be added up, or that the layer would round to zero.

    Args:
        name: Of the layer, for messages.
        largest: max |x|; 0 is fine.
        activation_bits: Of the layer's input; 0 for none.

    Raises:
        NumericalError: Naming the magnitude.
    """
    if largest > LARGEST_TOKEN:
        raise NumericalError(
            f"Calibration tokens at '{name}' reach {largest:.3g}; above {LARGEST_TOKEN:g} their squares overflow.",
            "Check the model in its original precision and the calibration data; one of them is wrong.",
        )
    smallest = MIN_RANGE if rounds_activations(activation_bits) else SMALLEST_TOKEN
    if 0 < largest < smallest:
        raise NumericalError(
            f"Calibration tokens at '{name}' are at most {largest:.3g}; below {smallest:g} they are lost in rounding.",
            "Multiply the input by a power of two and divide the weights by it, or leave the module out (--modules).",
        )


def check_result(name: str, result: QuantizedLinear) -> None:
    """The last look at what a method made of a layer, so that nothing that is not a number is ever stored.

    Raises:
        NumericalError: If a scale, a factor, the router or an outlier is NaN or infinite, or a scale is cut off at
            float16's end.
    """
    adapters = result.adapters
    parts: dict[str, Tensor | None] = {"scales": result.weight.scales, "inv_omega": result.inv_omega}
    if adapters is not None:
        parts |= {part: getattr(adapters, part) for part in ("down", "up", "down_scale", "up_scale", "router")}
    if result.parts is not None:
        parts |= {part: getattr(result.parts, part) for part in PART_TENSORS}
    for part, values in parts.items():
        if values is None or not values.is_floating_point() or not values.numel():
            continue
        largest = float(torch.maximum(values.amax(), -values.amin()))
        if not largest < (LARGEST_SCALE if part == "scales" else float("inf")):
            raise NumericalError(
                f"Quantizing '{name}' gives {part} that {values.dtype} cannot hold.".replace("torch.", ""),
                "Bring the layer's weights and inputs into the range of float16, or choose method rtn.",
            )


@contextmanager
def solvable(name: str) -> Iterator[None]:
    """A failed eigenproblem or factorization inside is an error that names the layer.

    Raises:
        NumericalError: In place of LinAlgError.
    """
    try:
        yield
    except (np.linalg.LinAlgError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined] # torch hides it
        raise NumericalError(
            f"The error of '{name}' cannot be decomposed: its weights and calibration tokens span too wide a range.",
            "Check both for outliers that are errors, or choose method rtn, which decomposes nothing.",
        ) from error


def _share(groups: Tensor, tiny: Tensor, largest: float) -> float:
    """Share of the squared weights `[out, groups, width]` that lies in the groups that are `tiny`."""
    energy = (groups.double() / largest).square_().sum(-1)
    return float(energy[tiny].sum() / energy.sum())


def _rescale(verb: str) -> str:
    return f"{verb} them by a power of two and undo it on the layer's output, or leave the module out (--modules)."
