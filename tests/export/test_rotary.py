"""A rotary embedding becomes one node where the node computes the same, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import pytest

from qe_edge.export.lowering.rotary import FuseRotary
from tests.conftest import Exported

LAYERS = 2


def turn_the_second_half_back(model: ir.Model) -> None:
    twice = [node for node in model.graph if node.op_type == "Concat" and len(set(node.inputs)) < len(node.inputs)]
    back = ir.node("Neg", [twice[-1].inputs[1]])
    model.graph.insert_before(twice[-1], back)
    twice[-1].replace_input_with(1, back.outputs[0])


def add_something_of_the_embeddings(model: ir.Model) -> None:
    (sine,) = (node for node in model.graph if node.op_type == "Sin")
    (embeds,) = (value for value in model.graph.inputs if value.name == "inputs_embeds")
    zero = ir.node("ReduceMin", [embeds], {"keepdims": 0})
    moved = ir.node("Add", [sine.inputs[0], zero.outputs[0]])
    model.graph.insert_before(sine, [zero, moved])
    sine.replace_input_with(0, moved.outputs[0])


@pytest.mark.parametrize(
    ("change", "fused"),
    [(lambda _model: None, LAYERS), (turn_the_second_half_back, 0), (add_something_of_the_embeddings, 0)],
)
def test_only_angles_that_repeat_are_taken(exported: Exported, change: Callable[[ir.Model], None], fused: int) -> None:
    model = ir.load(exported.onnx / "language.onnx")
    change(model)
    work = FuseRotary()
    work(model)
    assert work.fused == fused
