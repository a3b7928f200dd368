"""RMS norms are exported so that ONNX Runtime makes one node of each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qe_edge.export.norms import divide_by_roots
from tests.conftest import Exported

NORMS = 5  # two of each of two layers, and the last one


def test_every_norm_of_the_language_model_becomes_one_node(exported: Exported, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    file = exported.onnx / "language.onnx"
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    counts = Counter(
        node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    )
    written = Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
    assert counts["SimplifiedLayerNormalization"] == written["ReduceMean"] >= NORMS
    assert not counts["ReduceMean"]
    assert not written["Reciprocal"]


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("r = Sqrt(v)\n q = Reciprocal(r)\n y = Mul(x, q)", 0),
        ("r = Sqrt(v)\n q = Reciprocal(r)\n y = Mul(q, x)", 0),
        ("r = Sqrt(v)\n q = Reciprocal(r)\n y = Mul(q, q)", 1),
        ("r = Sqrt(v)\n q = Reciprocal(r)\n z = Mul(x, q)\n y = Add(z, q)", 1),
        ("q = Reciprocal(v)\n y = Mul(x, q)", 1),
        ("r = Sqrt(v)\n q = Reciprocal(r)\n y = Add(x, q)", 1),
    ],
)
def test_only_products_with_one_over_a_root_change(text: str, left: int) -> None:
    source = f'<ir_version: 10, opset_import: ["": 21]> g (float[4] x, float[4] v) => (float[4] y) {{\n {text}\n}}'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(source))
    divide_by_roots(model)
    changed = ir.serde.serialize_model(model)
    onnx.checker.check_model(changed, full_check=True)
    counts = Counter(node.op_type for node in changed.graph.node)
    assert counts["Reciprocal"] == left
    assert counts["Div"] == 1 - left
