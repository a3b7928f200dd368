from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir import tape

from qe_edge.export.layers import layers_graph
from qe_edge.export.lowering.expand import expand_gelu
from qe_edge.export.lowering.inline import inline_layers
from qe_edge.export.lowering.onnxruntime import lower_for_onnxruntime
from qe_edge.export.lowering.precision import MASKED, convert_constant, to_half
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.manifest import GRAPHS
from qe_edge.system.errors import TargetError
from tests.conftest import Exported
from tests.export.single_layers import Variant, make_layer, relative_error, run

VARIANTS = {
    "per channel": Variant(),
    "per channel, asymmetric": Variant(symmetric=False),
    "groups": Variant(in_features=96, group_size=32, act_bits=0),
    "groups, asymmetric": Variant(in_features=96, group_size=32, symmetric=False, act_bits=0),
    "one block": Variant(in_features=48, factors="float"),
    "int4 factors": Variant(factors="int4", rank_shared=3),
    "neither experts nor bias": Variant(experts=0, bias=False, inv_omega=False),
    "rounding only": Variant(factors="none", bias=False, inv_omega=False),
}


@pytest.mark.parametrize("lower", [inline_layers, lower_for_onnxruntime])
@pytest.mark.parametrize("name", VARIANTS)
def test_inlined_layers_compute_the_same(name: str, lower: Callable[[ir.Model], object]) -> None:
    layers = {"first": make_layer(VARIANTS[name]), "second": make_layer(Variant(act_bits=VARIANTS[name].act_bits))}
    model = layers_graph(layers)
    lower(model)
    assert not model.functions
    assert {node.domain for node in model.graph} == {""}
    inputs = {key: torch.randn(2, 5, layer.in_features) for key, layer in layers.items()}
    outputs = run(model, {f"{key}.x": x.numpy() for key, x in inputs.items()})
    for key, layer in layers.items():
        assert relative_error(outputs[f"{key}.output"], layer(inputs[key]).numpy()) < 1e-4


def test_neutral_operands_leave_no_trace() -> None:
    plain = Variant(factors="none", bias=False, inv_omega=False, act_bits=0)
    model = layers_graph({"plain": make_layer(plain), "full": make_layer(Variant(act_bits=0))})
    inline_layers(model)
    assert [node.op_type for node in model.graph if (node.name or "").startswith("plain/")] == [
        "DequantizeLinear", "MatMul",
    ]  # fmt: skip
    assert {name for name in model.graph.initializers if name.startswith("plain.")} == {
        "plain.qweight", "plain.block_scales",
    }  # fmt: skip


def test_a_width_that_no_block_divides() -> None:
    model = layers_graph({"layer": make_layer(Variant(in_features=33))})
    with pytest.raises(TargetError, match="'layer' has 33 inputs") as caught:
        inline_layers(model)
    assert "'cpu'" in caught.value.remedy


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_written_out(approximate: str) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 100]))
    ops = tape.Tape()
    y = ops.op("Gelu", [x], {"approximate": approximate})
    y.name, y.type, y.shape = "y", x.type, x.shape
    model = ir.Model(ir.Graph([x], [y], nodes=ops.nodes, opset_imports={"": 21}, name="gelu"), ir_version=10)
    expand_gelu(model)
    assert "Gelu" not in {node.op_type for node in model.graph}
    values = torch.linspace(-6, 6, 100).reshape(1, -1)
    expected = torch.nn.functional.gelu(values, approximate=approximate)
    assert np.abs(run(model, {"x": values.numpy()})["y"] - expected.numpy()).max() < 1e-6


def test_products_are_half_and_sums_are_not() -> None:
    model = layers_graph({"layer": make_layer(Variant())})
    precision = lower_for_tensorrt(model)
    assert sorted(precision.products.values()) == [
        "float32", "int4 weights, float16", "int8 weights, float16", "int8 weights, float16",
    ]  # fmt: skip
    assert {name for name in precision.others if name.endswith("float16")} == set()


def test_large_activations_stay_finite() -> None:
    """The sum of two activations of 60,000, and its square, exceed float16."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4, 64]))
    ops = tape.Tape()
    initializers = [ir.Value(name="w", const_value=ir.tensor(np.eye(64, dtype=np.float32), name="w"))]
    initializers[0].type, initializers[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([64, 64])
    product = ops.op("MatMul", [x, initializers[0]])
    y = ops.op("Mul", [ops.op("Add", [x, product]), product])
    for number, node in enumerate(ops.nodes):
        node.name, node.outputs[0].name = f"n{number}", f"v{number}"
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    graph = ir.Graph([x], [y], nodes=ops.nodes, initializers=initializers, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    precision = to_half(model)
    assert precision == {"n0": "float16", "n1": "float32", "n2": "float32"}
    values = np.full((1, 4, 64), 6e4, np.float32)
    assert relative_error(run(model, {"x": values})["v2"], 2 * values * values) < 1e-3


def test_constants_take_the_type_of_their_users() -> None:
    """The gelu of a product is computed in half, and so are the constants of its definition."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4, 64]))
    weight = ir.tensor(np.eye(64, dtype=np.float32), name="w")
    w = ir.Value(name="w", const_value=weight, shape=ir.Shape([64, 64]), type=ir.TensorType(ir.DataType.FLOAT))
    ops = tape.Tape()
    y = ops.op("Gelu", [ops.op("MatMul", [x, w])])
    y.name, y.type, y.shape = "y", x.type, x.shape
    for number, node in enumerate(ops.nodes):
        node.name = f"n{number}"
    graph = ir.Graph([x], [y], nodes=ops.nodes, initializers=[w], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    lower_for_tensorrt(model)
    values = np.linspace(-3, 3, 256, dtype=np.float32).reshape(1, 4, 64)
    expected = torch.nn.functional.gelu(torch.from_numpy(values)).numpy()
    assert relative_error(run(model, {"x": values})["y"], expected) < 2e-3


def test_masks_stay_usable_in_half() -> None:
    smallest = np.array([np.finfo(np.float32).min, -np.inf, 0.0, 1e9], np.float32)
    assert convert_constant(smallest, ir.DataType.FLOAT16).tolist() == [MASKED, MASKED, 0.0, 65504.0]


class HalfSession:
    """A lowered graph in ONNX Runtime."""

    steady = False

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def run(self, feeds: dict[str, np.ndarray], into: object = None) -> dict[str, np.ndarray]:
        halves = {value.name for value in self.session.get_inputs() if "float16" in value.type}
        cast = {name: array.astype(np.float16) if name in halves else array for name, array in feeds.items()}
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, cast), strict=True))


@pytest.fixture(scope="module")
def lowered(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageEngine:
    folder = tmp_path_factory.mktemp("lowered")
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    sessions = {}
    for name in GRAPHS:
        model = ir.load(exported.onnx / f"{name}.onnx")
        lower_for_tensorrt(model)
        ir.save(model, folder / f"{name}.onnx", external_data=f"{name}.onnx.data")
        sessions[name] = HalfSession(folder / f"{name}.onnx")
    return VisionLanguageEngine(engine.manifest, engine.family, engine.processor, engine._embedding, sessions)


def test_the_lowered_model_answers_alike(exported: Exported, lowered: VisionLanguageEngine, held_out: list) -> None:
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    encoded = engine.encode(held_out, answers=True)
    valid = encoded.attention_mask == 1
    assert relative_error(lowered.logits(encoded)[valid], engine.logits(encoded)[valid]) < 2e-2
    assert lowered.generate(held_out, 4) == engine.generate(held_out, 4)


def test_the_lowered_model_takes_activations_beyond_float16(lowered: VisionLanguageEngine, held_out: list) -> None:
    """A residual stream of 1e5: its squares and itself exceed float16, and norms make the result the same."""
    encoded = lowered.encode(held_out[:2])
    embedding = lowered._embedding
    expected = lowered.logits(encoded)
    features = lowered.features(encoded)
    assert features is not None
    try:
        lowered._embedding = lambda tokens: embedding(tokens) * 1e5  # type: ignore[assignment]
        logits, _ = lowered.prefill(encoded, features * 1e5)
    finally:
        lowered._embedding = embedding
    assert np.isfinite(logits).all()
    assert np.isfinite(expected).all()
