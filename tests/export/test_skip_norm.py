"""An addition and the RMS norm of its sum become one node of ONNX Runtime, and nothing else does."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qe_edge.export.lowering.skip_norm import NAME, FuseSkipNorm

HEAD = (
    '<ir_version: 10, opset_import: ["": 21]> g (float[b, s, 8] x, float[b, s, 8] y, float[b, s, 1] z)'
    " => (float[b, s, 8] normed, float[b, s, 8] total) <float[8] weight = {1, 2, 3, 4, 5, 6, 7, 8},"
    " float epsilon = {0.25}, float two = {2}, float three = {3}, int64[1] last = {-1}, int64[1] first = {1}> {\n"
)
NORM = (
    "total = Add(x, y)\n square = Pow(total, two)\n mean = ReduceMean<keepdims = 1>(square, last)\n"
    " moved = Add(mean, epsilon)\n root = Sqrt(moved)\n unit = Div(total, root)\n normed = Mul(weight, unit)\n"
)


def graph(text: str) -> ir.Model:
    model = onnx.parser.parse_model(f"{HEAD}{text}}}")
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def run(model: ir.Model) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {
        name: rng.uniform(0.5, 2, (2, 3, width)).astype(np.float32) for name, width in (("x", 8), ("y", 8), ("z", 1))
    }
    file = ir.serde.serialize_model(model).SerializeToString()
    given = {value.name: feeds[value.name] for value in model.graph.inputs if value.name}
    return list(ort.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, given))


@pytest.mark.parametrize(
    ("old", "new", "fused"),
    [
        ("", "", 1),
        ("Mul(weight, unit)", "Mul(unit, weight)", 1),
        ("Pow(total, two)", "Pow(total, three)", 0),
        ("Pow(total, two)", "Pow(x, two)", 0),
        ("Div(total, root)", "Div(x, root)", 0),
        ("(square, last)", "(square, first)", 0),
        ("total = Add(x, y)", "total = Add(x, z)", 0),
        ("total = Add(x, y)", "total = Sub(x, y)", 0),
        ("Mul(weight, unit)", "Mul(total, unit)", 0),
    ],
)
def test_only_the_norm_of_a_sum_changes(old: str, new: str, fused: int) -> None:
    text = NORM.replace(old, new)
    model, plain = graph(text), graph(text)
    work = FuseSkipNorm()
    work(model)
    assert work.fused == sum(node.op_type == NAME for node in model.graph) == fused
    for found, wanted in zip(run(model), run(plain), strict=True):
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
