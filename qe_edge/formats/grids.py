"""Put layers of several grids on one grid if that changes no number: many readers take one kind of layer only."""

from __future__ import annotations

import math
from dataclasses import replace

from qe_edge.formats.base import Conversion
from qe_edge.formats.carried import CarriedLayer
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid

SMALLEST_GROUP = 32  # that kernels have


def on_one_grid(conversion: Conversion) -> Conversion:
    """Put all coded layers on the narrowest grid that holds each of them.

    A code of 3 bits is also a code of 4 bits, a scale of 128 channels serves both halves, and a symmetric layer has
    zero points of 0. If the groups have no common size of at least 32, each layer keeps its own.

    Args:
        conversion: The checkpoint.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     conversion = on_one_grid(plan_conversion(source, FORMATS["gptq"]()))
        ...     print({layer.grid for layer in conversion.coded.values()})
    """
    coded = conversion.coded
    own = [layer.own_grid for layer in coded.values()]
    if len(set(own)) < 2:
        return conversion
    bits, symmetric = max(grid.bits for grid in own), all(grid.symmetric for grid in own)
    sizes = {grid.group_size for grid in own}
    common = next(iter(sizes)) if len(sizes) == 1 else math.gcd(*(_width(layer) for layer in coded.values()))
    keep = common != PER_CHANNEL and common < SMALLEST_GROUP
    wider = {
        name: replace(layer, wider=WeightGrid(bits, layer.own_grid.group_size if keep else common, symmetric))
        for name, layer in coded.items()
    }
    return replace(conversion, layers=conversion.layers | wider)


def _width(layer: CarriedLayer) -> int:
    """Input channels of one scale."""
    size = layer.own_grid.group_size
    return layer.geometry.in_features if size == PER_CHANNEL else size
