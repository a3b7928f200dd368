"""The lowering for the plugin, as far as it can be seen without its library; the plugin's ladder builds engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from qe_edge.export.build import _is_listed, build_engines
from qe_edge.export.layers import int4, layers_graph
from qe_edge.export.lowering import inline, plugin, tensorrt
from qe_edge.export.lowering.half import PLUGIN_PRODUCTS
from qe_edge.export.lowering.inline import array_of, operands_of
from qe_edge.export.lowering.onnxruntime import lower_for_onnxruntime
from qe_edge.export.lowering.plugin import is_packed, pack_layers
from qe_edge.export.lowering.siblings import join_siblings
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.layers.linear import QELinear
from qe_edge.models.family import Sample
from qe_edge.prepack.lower import LAYOUT_VERSION, read_node
from qe_edge.prepack.reference import qe_linear
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.manifest import GRAPHS
from qe_edge.system.errors import InputError, TargetError
from tests.conftest import Exported
from tests.export import single_layers
from tests.export.single_layers import Variant, make_layer
from tests.export.test_lowering import HalfSession

NODES = {"visual": 4, "merger": 2, "language": 8}  # q/k/v and gate/up count once


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(model: ir.Model, seed: int = 0) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    ir.external_data.load_to_model(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng, sizes = np.random.default_rng(seed), {"batch": 1, "sequence": 5, "past": 0}
    feeds = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else sizes.get(size, 5) for size in value.shape]
        real = rng.standard_normal(shape).astype(np.float32)
        feeds[value.name] = np.ones(shape, np.int64) if value.type == "tensor(int64)" else real
    return list(session.run(None, feeds))


def test_joined_siblings_of_a_model_compute_the_same(exported: Exported) -> None:
    apart, joined = (ir.load(exported.onnx / "language.onnx") for _ in range(2))
    join_siblings(joined)
    assert kinds(joined)["QELinear"] == NODES["language"] < kinds(apart)["QELinear"]
    assert kinds(joined)["Split"] == kinds(apart)["Split"] + 4
    for before, after in zip(run(apart), run(joined), strict=True):
        assert np.abs(before - after).max() <= 2e-5 * np.abs(before).max()


VARIANTS = [
    Variant(),
    Variant(factors="int4"),
    Variant(factors="float", inv_omega=False),
    Variant(factors="none", bias=False),
    Variant(experts=0, rank_routed=0),
    Variant(in_features=256, group_size=128, symmetric=False, act_bits=0),
    Variant(in_features=192, bits=3, group_size=64, symmetric=False, act_bits=6, factors="int4"),
]


def random_input(features: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 9, features)).astype(np.float32)


def siblings_graph(layers: dict[str, QELinear]) -> ir.Model:
    """Layers that read the same input, `<first name>.x`."""
    model = layers_graph(layers)
    for node in list(model.graph)[1:]:
        node.replace_input_with(0, model.graph.inputs[0])
    del model.graph.inputs[1:]
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_joined_siblings_compute_the_same(variant: Variant) -> None:
    apart, joined = (siblings_graph({name: make_layer(variant) for name in "qkv"}) for _ in range(2))
    join_siblings(joined)
    assert kinds(joined) == {"QELinear": 1, "Split": 1}
    feeds = {"q.x": random_input(variant.in_features)}
    before, after = (single_layers.run(model, feeds) for model in (apart, joined))
    assert list(before) == list(after)
    for name, y in before.items():
        assert np.abs(y - after[name]).max() <= 1e-5 * np.abs(y).max()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_what_is_packed_computes_what_was_exported(variant: Variant) -> None:
    """The plugin's float64 reference on the layer that prepack reads, and the exported graph in ONNX Runtime."""
    model = layers_graph({"layer": make_layer(variant)})
    x = random_input(variant.in_features)
    (expected,) = single_layers.run(model, {"layer.x": x}).values()
    proto = ir.to_proto(model)
    (node,) = proto.graph.node
    linear = read_node(node, {tensor.name: tensor for tensor in proto.graph.initializer})
    y = qe_linear(linear, x[0], "f16")
    limit = 1e-6 if variant.act_bits else 1e-3  # without quantization, the reference rounds x to float16
    assert np.linalg.norm(y - expected[0]) <= limit * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("layer", "listed"),
    [("a.mlp", True), ("a.mlp_myl0_2", True), ("a.mlp2_myl0_2", False), ("__myl_MulAdd_myl0_1", False)],
)
def test_a_node_in_an_engines_layer_list(layer: str, listed: bool) -> None:
    assert _is_listed("a.mlp", {layer: "custom_layer"}) is listed


@pytest.mark.parametrize("operand", ["down", "router", "inv_omega", "down_scale"])
def test_layers_that_share_only_their_input_stay_apart(operand: str) -> None:
    layers = {"q": make_layer(Variant()), "k": make_layer(Variant())}
    model = siblings_graph(layers)
    value = getattr(operands_of(list(model.graph)[1]), operand)
    changed = array_of(value).copy()
    changed.flat[3] += 1
    value.const_value = ir.tensor(changed, name=value.name)
    join_siblings(model)
    assert kinds(model) == {"QELinear": 2}


def test_only_layers_that_read_the_same_are_joined() -> None:
    model = layers_graph({"one": make_layer(Variant()), "two": make_layer(Variant())})
    join_siblings(model)
    assert kinds(model) == {"QELinear": 2}


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize(
    "variant", [Variant(bits=3), Variant(in_features=128, bits=3, group_size=64, symmetric=False, act_bits=0)], ids=str
)
def test_siblings_are_packed_with_3_bits_when_all_fit(variant: Variant, beyond: bool) -> None:
    model = siblings_graph({name: make_layer(variant) for name in "qkv"})
    if beyond:
        value = operands_of(list(model.graph)[2]).qweight
        codes = array_of(value).astype(np.int8)
        codes[5, 7] = 4
        value.const_value = int4(torch.from_numpy(codes))
        value.const_value.name = value.name
    pack_layers(model)
    (node,) = (each for each in model.graph if is_packed(each))
    bits = 4 if beyond else 3
    assert node.attributes["weight_bits"].as_int() == bits
    tensor = node.inputs[1].const_value
    assert tensor.nbytes == 160 * 128 * bits // 8  # three times 48 columns, padded


@pytest.mark.parametrize("siblings", ["q", "qkv"])
@pytest.mark.parametrize("beyond", [False, True])
def test_int4_factors_are_packed_with_4_bits_when_all_fit(siblings: str, beyond: bool) -> None:
    """As are those of layers that are joined; one factor with INT8 codes makes INT8 of all."""
    model = siblings_graph({name: make_layer(Variant(factors="int4")) for name in siblings})
    if beyond:
        value = operands_of(list(model.graph)[-1]).up
        codes = array_of(value).astype(np.int8)
        codes[2, 3] = 8
        value.const_value = ir.tensor(codes, name=value.name)
        value.type = ir.TensorType(ir.DataType.INT8)
    pack_layers(model)
    (node,) = (each for each in model.graph if is_packed(each))
    bits = 8 if beyond else 4
    assert node.attributes["adapter_bits"].as_int() == bits
    sizes = {value.name.rpartition(".")[2]: value.const_value for value in node.inputs[1:]}
    columns = 16 + 4 * 16  # ranks of 8, padded
    assert sizes["down"].dtype == sizes["up"].dtype == ir.DataType.INT8
    assert sizes["down"].nbytes == 64 * columns * bits // 8
    assert sizes["up"].nbytes == {"q": 64, "qkv": 160}[siblings] * columns * bits // 8


@pytest.mark.parametrize("graph", NODES)
def test_layers_become_nodes_of_the_plugin(exported: Exported, graph: str) -> None:
    model = ir.load(exported.onnx / f"{graph}.onnx")
    precision = lower_for_tensorrt(model, plugin=True)
    packed = [node for node in model.graph if is_packed(node)]
    assert len(packed) == NODES[graph]
    assert list(precision.products.values()).count(PLUGIN_PRODUCTS[4]) == NODES[graph]
    assert not model.functions
    for node in packed:
        assert node.inputs[1].dtype == ir.DataType.INT8  # the parser would widen UINT8 to INT32
        assert {node.inputs[0].dtype, node.outputs[0].dtype} == {ir.DataType.FLOAT16}
        assert node.attributes["layout_version"].as_int() == LAYOUT_VERSION
        rows, columns = (node.attributes[key].as_int() for key in ("in_features", "out_features"))
        assert node.inputs[1].shape.numpy() == (-(-columns // 32), -(-rows // 128) * 32 * 128 // 2)
    left = {name for name in model.graph.initializers if name.endswith((".qweight", ".down", ".up"))}
    assert {name for name in left if ".packed." not in name} == set()


def lowered_with_stand_ins(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower as for the plugin, with the canonical function between casts where the plugin would compute."""
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt, "pack_layers", join_siblings)
        lower_for_tensorrt(model, plugin=True)
    for node in [node for node in model.graph if is_packed(node)]:
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        assert {x.dtype, y.dtype} == {ir.DataType.FLOAT16}
        widened = ir.node("Cast", [x], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}/widen")
        widened.outputs[0].name = f"{node.name}/wide"
        users = list(y.uses())
        narrowed = ir.node("Cast", [y], {"to": ir.DataType.FLOAT16.value}, name=f"{node.name}/narrow")
        narrowed.outputs[0].name = f"{node.name}/narrowed"
        node.replace_input_with(0, widened.outputs[0])
        model.graph.insert_before(node, widened)
        model.graph.insert_after(node, narrowed)
        for user, index in users:
            user.replace_input_with(index, narrowed.outputs[0])
        y.type = ir.TensorType(ir.DataType.FLOAT)


def test_the_graph_around_the_plugin_answers_alike(
    exported: Exported, tmp_path: Path, held_out: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    sessions = {}
    for name in GRAPHS:
        model = ir.load(exported.onnx / f"{name}.onnx")
        lowered_with_stand_ins(model, monkeypatch)
        ir.save(model, tmp_path / f"{name}.onnx", external_data=f"{name}.onnx.data")
        sessions[name] = HalfSession(tmp_path / f"{name}.onnx")
    lowered = VisionLanguageEngine(engine.manifest, engine.family, engine.processor, engine._embedding, sessions)
    encoded = engine.encode(held_out, answers=True)
    valid = encoded.attention_mask == 1
    difference = lowered.logits(encoded)[valid] - engine.logits(encoded)[valid]
    assert np.linalg.norm(difference) < 2e-2 * np.linalg.norm(engine.logits(encoded)[valid])
    assert lowered.generate(held_out, 4) == engine.generate(held_out, 4)


def test_a_layer_that_the_kernels_cannot_run() -> None:
    model = layers_graph({"layer": make_layer(Variant(group_size=32, symmetric=False))})
    with pytest.raises(TargetError, match="The plugin cannot run the layer 'layer': group_size is 32") as caught:
        pack_layers(model)
    assert "-1, 64 or 128" in caught.value.remedy


def test_a_target_without_tensorrt_takes_no_plugin(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'cpu' is ONNX Runtime on any CPU, which takes no TensorRT plugin"):
        build_engines(exported.onnx, tmp_path / "cpu", "cpu", plugin_library=tmp_path / "libqe_plugin.so")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lower", [pack_layers, lower_for_onnxruntime, lower_for_tensorrt])
def test_large_weights_are_made_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lower: Callable[[ir.Model], object]
) -> None:
    """The same file as of weights that stay in memory."""
    layers, waiting = {name: make_layer(VARIANTS[0]) for name in "qkv"}, []
    for large in (1, 1 << 40):
        monkeypatch.setattr(inline, "LARGE", large)
        monkeypatch.setattr(plugin, "LARGE", large)
        model = siblings_graph(layers)
        lower(model)
        values = [value.const_value for value in model.graph.initializers.values()]
        waiting.append(sum(isinstance(value, ir.LazyTensor) for value in values))
        ir.save(model, tmp_path / f"{large}.onnx")
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / f"{1 << 40}.onnx").read_bytes()
    assert waiting[0] > waiting[1]
