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
    """

    names: list[str]
    linears: list[nn.Linear]

    def problems(self, *, stacked: bool) -> list[list[int]]:
        """Numbers of the layers that are quantized together: all of them as one problem, or each alone."""
        numbers = list(range(len(self.names)))
        return [numbers] if stacked else [[number] for number in numbers]


def linear_groups(block: Block, siblings: Sequence[Sequence[str]]) -> list[LinearGroup]:
    """Linear layers of a block, those that read the same input together."""
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
    """Put `module` at the dotted path `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
