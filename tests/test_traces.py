"""What shares a trace, and what does not: a trace of another model would let a wrong export pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from qe_edge import make_recipe, quantize_linear
from qe_edge.models.family import GraphSpec
from tests.traces import fingerprint, shared


class Part(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear, self.eps, self.axes = nn.LayerNorm(4), linear, 1e-6, [0, 1]
        self.register_buffer("table", torch.zeros(3))


def spec(linear: nn.Module | None = None) -> GraphSpec:
    return GraphSpec("part", Part(linear or nn.Linear(4, 8)), (torch.ones(1, 4),), ["x"], ["y"], ({0: "n"},), {})


def test_weights_of_linear_layers_are_none_of_a_trace() -> None:
    quantized = quantize_linear(torch.randn(8, 4), torch.zeros(0, 4), make_recipe(method="rtn"))
    assert fingerprint(spec()) == fingerprint(spec()) == fingerprint(spec(quantized))


def change(**values: object) -> Callable[[GraphSpec], GraphSpec]:
    def changed(of: GraphSpec) -> GraphSpec:
        for name, value in values.items():
            setattr(of.module, name, value)
        return of

    return changed


@pytest.mark.parametrize(
    "changed",
    [
        change(eps=1e-5),
        change(axes=[1, 0]),
        change(norm=nn.LayerNorm(4, eps=1e-3)),
        change(norm=nn.LayerNorm(4, bias=False)),
        change(table=torch.ones(3)),
        change(linear=nn.Linear(4, 9)),
        change(linear=nn.Identity()),
        lambda of: (nn.init.constant_(of.module.norm.weight, 2.0), of)[1],  # type: ignore[union-attr]
        lambda of: replace(of, inputs=(torch.zeros(1, 4),)),
        lambda of: replace(of, inputs=(torch.ones(1, 4, dtype=torch.float64),)),
        lambda of: replace(of, dynamic_shapes=({1: "n"},)),
        lambda of: replace(of, output_names=["z"]),
    ],
)
def test_what_a_trace_sees_makes_another(changed: Callable[[GraphSpec], GraphSpec]) -> None:
    assert fingerprint(changed(spec())) != fingerprint(spec())


def test_a_trace_is_made_once_and_every_model_is_a_copy(tmp_path: Path) -> None:
    traced = []

    def trace(of: GraphSpec) -> ir.Model:
        traced.append(of)
        text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
        return ir.from_onnx_text(text)

    trace_once = shared(trace, tmp_path)
    first = trace_once(spec())
    first.graph.name = "changed"
    assert trace_once(spec()).graph.name == "g"
    assert len(traced) == 1
    trace_once(change(eps=1e-5)(spec()))
    assert len(traced) == 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".onnx", ".onnx"]
