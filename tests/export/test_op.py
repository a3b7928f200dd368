from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qe_edge.export import layers as layers_of_export
from qe_edge.export.layers import layers_graph
from qe_edge.export.op import DOMAIN, INPUTS, NAME
from qe_edge.system.errors import ModelError
from tests.export.single_layers import Variant, make_layer, relative_error, run

VARIANTS = st.builds(
    Variant,
    in_features=st.sampled_from([33, 48, 64, 160]),
    out_features=st.sampled_from([1, 5, 48]),
    bits=st.sampled_from([3, 4]),
    act_bits=st.just(8),
    group_size=st.sampled_from([-1, 16, 32]),
    symmetric=st.booleans(),
    factors=st.sampled_from(["none", "float", "int8", "int4"]),
    rank_shared=st.sampled_from([0, 3, 8]),
    rank_routed=st.sampled_from([1, 8]),
    experts=st.sampled_from([0, 2, 5]),
    bias=st.booleans(),
    inv_omega=st.booleans(),
)


@settings(max_examples=60)
@given(
    variants=st.lists(VARIANTS, min_size=1, max_size=3), act_bits=st.sampled_from([0, 6, 8]), seed=st.integers(0, 99)
)
def test_the_function_is_the_layer(variants: list[Variant], act_bits: int, seed: int) -> None:
    """Layers of one graph share a function, whatever each of them has."""
    chosen = [Variant(**{**vars(variant), "act_bits": act_bits}) for variant in variants]
    layers = {f"layer{index}": make_layer(variant, seed + index) for index, variant in enumerate(chosen)}
    model = layers_graph(layers)
    assert len(model.functions) == 1
    inputs = {name: torch.randn(2, 5, layer.in_features) for name, layer in layers.items()}
    outputs = run(model, {f"{name}.x": x.numpy() for name, x in inputs.items()})
    for name, layer in layers.items():
        assert relative_error(outputs[f"{name}.output"], layer(inputs[name]).numpy()) < 1e-5


@settings(max_examples=60)
@given(variants=st.lists(VARIANTS, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_operands_have_the_size_and_type_that_they_announce(variants: list[Variant], seed: int) -> None:
    """Large ones are made when they are written."""
    layers = {f"layer{index}": make_layer(variant, seed) for index, variant in enumerate(variants)}
    late = 0
    for value in layers_graph(layers).graph.initializers.values():
        announced = value.const_value
        assert announced is not None
        if isinstance(announced, ir.LazyTensor):
            late += 1
            made = announced.raw()
            assert (made.dtype, made.shape) == (announced.dtype, announced.shape), value.name
            assert made.tobytes() == announced.tobytes()
    assert late >= len(layers)


def test_a_layers_weight_is_not_there_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    convert = layers_of_export._tensor
    monkeypatch.setattr(layers_of_export, "_tensor", lambda key, *given: made.append(key) or convert(key, *given))
    model = layers_graph({"a": make_layer(Variant())})
    assert not set(made) & {"qweight", "down", "up"}
    ir.to_proto(model)
    assert set(made) >= {"qweight", "down", "up"}


def test_the_graph_is_valid_onnx() -> None:
    model = layers_graph({"a": make_layer(Variant()), "b": make_layer(Variant(bias=False, experts=0))})
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_a_node_says_everything_about_its_layer() -> None:
    variant = Variant(bits=3, act_bits=6, group_size=32, symmetric=False, in_features=64)
    (node,) = layers_graph({"model.layers.0.q_proj": make_layer(variant)}).graph
    assert (node.domain, node.op_type, node.name) == (DOMAIN, NAME, "model.layers.0.q_proj")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "weight_bits": 3, "act_bits": 6, "group_size": 32, "rank_shared": 8, "rank_routed": 8, "num_experts": 4,
        "plugin_version": "1", "plugin_namespace": "",
    }  # fmt: skip
    shapes = {
        name: (value.dtype.name, list(value.shape)) for name, value in zip(INPUTS[1:], node.inputs[1:], strict=True)
    }
    assert shapes == {
        "qweight": ("INT4", [64, 48]), "scales": ("FLOAT", [2, 48]), "zeros": ("INT4", [2, 48]),
        "inv_omega": ("FLOAT", [64]), "down": ("INT8", [64, 40]), "up": ("INT8", [40, 48]),
        "down_scale": ("FLOAT", [40]), "up_scale": ("FLOAT", [48]), "router": ("FLOAT", [64, 4]),
        "bias": ("FLOAT", [48]),
    }  # fmt: skip


def test_absent_operands_are_absent() -> None:
    plain = Variant(factors="none", bias=False, inv_omega=False)
    (node,) = layers_graph({"layer": make_layer(plain)}).graph
    assert len(node.inputs) == 3


def test_siblings_share_what_they_share() -> None:
    first, second = make_layer(Variant(), seed=0), make_layer(Variant(out_features=16), seed=1)
    for key in ("down", "down_scale", "router"):
        setattr(second, key, getattr(first, key))
    model = layers_graph({"q": first, "k": second})
    q, k = model.graph
    shared = [name for name, a, b in zip(INPUTS, q.inputs, k.inputs, strict=True) if a is b and a is not None]
    assert shared == ["down", "down_scale", "router"]
    x = torch.randn(1, 7, 64)
    outputs = run(model, {"q.x": x.numpy(), "k.x": x.numpy()})
    assert relative_error(outputs["k.output"], second(x).numpy()) < 1e-5


def test_ties_between_experts_go_to_the_lowest() -> None:
    layer = make_layer(Variant(experts=4))
    assert layer.router is not None
    layer.router[2] = layer.router[1]
    layer.router[1:3] = 0
    x = torch.randn(1, 9, 64)
    index = layer.expert_index(x)
    assert index is not None
    assert (index == 1).all()
    found = run(layers_graph({"layer": layer}), {"layer.x": x.numpy()})["layer.output"]
    assert relative_error(found, layer(x).numpy()) < 1e-5


def test_a_token_of_zeros_gives_the_bias() -> None:
    layer = make_layer(Variant())
    assert layer.bias is not None
    found = run(layers_graph({"layer": layer}), {"layer.x": torch.zeros(1, 1, 64).numpy()})["layer.output"]
    assert (found[0, 0] == layer.bias.numpy()).all()


def test_one_graph_has_one_activation_width() -> None:
    layers = {"a": make_layer(Variant(act_bits=8)), "b": make_layer(Variant(act_bits=6))}
    with pytest.raises(ModelError, match=r"activations of \[6, 8\] bits"):
        layers_graph(layers)
