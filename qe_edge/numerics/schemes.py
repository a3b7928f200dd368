"""Named precision schemes: which grid for weights, how many bits for activations.

A new scheme is one line of `SCHEMES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid
from qe_edge.system.errors import UnknownNameError


@dataclass(frozen=True)
class Scheme:
    """A weight grid and an activation width.

    Attributes:
        name: As the user writes it, for example "w4a8".
        weight: Grid of the weights.
        activation_bits: 0 for unquantized (16-bit) activations, else bits of the per-token dynamic symmetric grid.

    Example:
        >>> scheme = get_scheme("w4a8")
        >>> scheme.weight
        WeightGrid(bits=4, group_size=-1, symmetric=True)
        >>> scheme.activation_bits
        8
    """

    name: str
    weight: WeightGrid
    activation_bits: int

    def with_grid(self, grid: WeightGrid) -> Scheme:
        """The same scheme with another grid of the weights."""
        return replace(self, weight=grid)

    def budget_grids(self) -> list[WeightGrid]:
        """Grids that a budget may give a layer, cheapest first: 3 or 4 bits, in groups as they are or half as large."""
        own = self.weight
        widths = BUDGET_WIDTHS if own.bits in BUDGET_WIDTHS else (own.bits,)
        sizes = (own.group_size,) if own.group_size == PER_CHANNEL else (own.group_size, own.group_size // 2)
        return [WeightGrid(bits, size, own.symmetric) for bits in widths for size in sizes]


BUDGET_WIDTHS = (3, 4)
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("w4a8", WeightGrid(4, PER_CHANNEL, symmetric=True), 8),
        Scheme("w4a6", WeightGrid(4, PER_CHANNEL, symmetric=True), 6),
        Scheme("w4a16", WeightGrid(4, 128, symmetric=False), 0),
        Scheme("w3a8", WeightGrid(3, PER_CHANNEL, symmetric=True), 8),
        Scheme("w3a16", WeightGrid(3, 128, symmetric=False), 0),
        Scheme("w2a16", WeightGrid(2, 64, symmetric=False), 0),  # an experiment: what a correction can still repair
    )
}


def get_scheme(name: str) -> Scheme:
    """Look up a scheme.

    Raises:
        UnknownNameError: If there is none of that name.

    Example:
        >>> get_scheme("w4a16").weight.group_size
        128
        >>> get_scheme("w4a9")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.UnknownNameError: There is no scheme 'w4a9'. Did you mean 'w4a8'? Known: w2a16,
        w3a16, w3a8, w4a16, w4a6, w4a8.
    """
    if name not in SCHEMES:
        raise UnknownNameError("scheme", name, SCHEMES)
    return SCHEMES[name]
