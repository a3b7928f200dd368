"""What is said of a model before any long work."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

from qe_edge.models.family import Block
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid
from qe_edge.quantization.preflight import note_groups
from qe_edge.system.errors import CommonNotice


def _blocks(width: int) -> list[Block]:
    module = nn.ModuleDict({"fc": nn.Linear(width, 32), "out": nn.Linear(128, 32)})
    return [Block(f"model.{number}.mlp", module, "visual") for number in range(2)]


@pytest.mark.parametrize(
    ("width", "instead"), [(100, "one scale per output channel"), (4304, "groups of 16"), (96, "groups of 32")]
)
def test_a_width_that_groups_do_not_divide(width: int, instead: str) -> None:
    with pytest.warns(CommonNotice) as told:
        note_groups(_blocks(width), [WeightGrid(4, 128), WeightGrid(3, 128)])
    assert [str(notice.message) for notice in told] == [
        f"Inputs of width {width} are no multiple of groups of 128; model.*.mlp.fc get {instead}."
    ]


@pytest.mark.parametrize(("width", "size"), [(256, 128), (64, 128), (100, PER_CHANNEL)])
def test_groups_that_fit_are_not_mentioned(width: int, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note_groups(_blocks(width), [WeightGrid(4, size)])
