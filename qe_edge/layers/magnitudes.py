"""Checks the numbers of a layer: its weights and tokens before a method reads them, and the method's result.

The rules are the same for single layers and whole models. Weights and tokens are finite. The scales of the weights are
float16, so weights beyond their largest value are refused. So is a layer whose weights are so small that they would all
become zero. A few small rows or groups beside large ones may become zero: the rounding of the others is larger.
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
        name: Name of the layer, for messages.
        weight: `[out, in]`, any float dtype that has a minimum.
        grid: Bits, group size and symmetry.

    Raises:
        NumericalError: For NaN, infinity, weights beyond float16 scales, and weights that would become zero.

    Example:
        >>> check_weight("mlp.down", torch.ones(4, 8), WeightGrid(4))
        >>> check_weight("mlp.down", torch.tensor([[1.0, float("nan")]]), WeightGrid(4))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: The weights 'mlp.down' hold NaN or infinity. The checkpoint is
        damaged or diverged in training; get a sound one.
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
        name: Name of the layer, for messages.
        largest: max |x|; 0 is fine.
        activation_bits: Width of the layer's activation grid; 0 for none.

    Raises:
        NumericalError: Naming the magnitude.

    Example:
        >>> check_tokens("mlp.down", largest=120.0, activation_bits=8)
        >>> check_tokens("mlp.down", largest=1e12)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: Calibration tokens at 'mlp.down' reach 1e+12; above 1e+09 their
        squares overflow. Check the model in its original precision and the calibration data; one of them is
        wrong.
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
    """Refuse a method's result that holds NaN or infinity, so that neither is ever stored.

    Raises:
        NumericalError: If a scale, a factor, the router or an outlier is NaN or infinite, or a scale is cut off at
            float16's end.

    Example:
        >>> from qe_edge.numerics.grids import quantize_weight
        >>> weight = quantize_weight(torch.ones(4, 8), WeightGrid(4))
        >>> check_result("mlp.down", QuantizedLinear(weight, 8, inv_omega=torch.ones(8).half()))
        >>> check_result("mlp.down", QuantizedLinear(weight, 8, inv_omega=torch.ones(8).half() / 0))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: Quantizing 'mlp.down' gives inv_omega that float16 cannot hold.
        Bring the layer's weights and inputs into the range of float16, or choose method rtn.
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
    """Turn a failed eigenproblem or factorization into an error that names the layer.

    Raises:
        NumericalError: In place of LinAlgError.

    Example:
        >>> with solvable("mlp.down"):
        ...     np.linalg.inv(np.zeros((2, 2)))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: The error of 'mlp.down' cannot be decomposed: its weights and
        calibration tokens span too wide a range. Check both for outliers that are errors, or choose method rtn,
        which decomposes nothing.
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
