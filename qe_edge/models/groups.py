"""Linear layers of a block, grouped by the input that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from qe_edge.models.family import Block


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers of one block that read the same input.

    Attributes:
        names: Full dotted names, in module order.
        linears: The layers.

    Example:
        >>> linears = [nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)]
        >>> group = LinearGroup(["attn.q_proj", "attn.k_proj", "attn.v_proj"], linears)
        >>> group.problems(stacked=True), group.problems(stacked=False)
        ([[0, 1, 2]], [[0], [1], [2]])
    """

    names: list[str]
    linears: list[nn.Linear]

    def problems(self, *, stacked: bool) -> list[list[int]]:
        """Return the numbers of the layers that are quantized together: all as one problem, or each alone."""
        numbers = list(range(len(self.names)))
        return [numbers] if stacked else [[number] for number in numbers]


def linear_groups(block: Block, siblings: Sequence[Sequence[str]]) -> list[LinearGroup]:
    """Group the linear layers of a block that read the same input.

    Example:
        >>> attention = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        >>> block = Block("layers.0", attention, "language")
        >>> [group.names for group in linear_groups(block, siblings=[("q_proj", "k_proj", "v_proj")])]
        [['layers.0.q_proj', 'layers.0.k_proj', 'layers.0.v_proj'], ['layers.0.o_proj']]
    """
    linears = {name: module for name, module in block.module.named_modules() if isinstance(module, nn.Linear)}
    groups: list[LinearGroup] = []
    seen: set[str] = set()
    for name in linears:
        if name in seen:
            continue
        parent, _, leaf = name.rpartition(".")
        family = next((names for names in siblings if leaf in names), (leaf,))
        names = [f"{parent}.{other}" if parent else other for other in family]
        names = [other for other in names if other in linears]
        seen.update(names)
        groups.append(LinearGroup([f"{block.name}.{other}" for other in names], [linears[other] for other in names]))
    return groups


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted path `name`.

    Example:
        >>> model = nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(8, 16)})})
        >>> set_module(model, "mlp.up", nn.Identity())
        >>> model.get_submodule("mlp.up")
        Identity()
    """
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
