"""Rung 7: `qe-edge build --plugin` made engines of the exported demo; their layer lists show the plugin."""

from __future__ import annotations

import json

import pytest

from prepack.lower import LAYOUT_VERSION
from tests.demo import DEMO, ENGINES, ONNX, graph, read_json

# what siblings that read the same input join to: q/k/v and gate/up in every decoder layer
JOINED = {"visual": 0, "merger": 0, "language": 3}


@pytest.mark.parametrize("name", JOINED)
def test_every_quantized_layer_is_a_plugin_node_of_the_engine(name: str) -> None:
    built = read_json(ENGINES / "engine.json")["graphs"][name]
    layers = [node.name for node in graph(name).graph.node if node.op_type == "QELinear"]
    blocks = len({layer.partition("layers.")[2].partition(".")[0] for layer in layers})
    assert len(built["plugin_nodes"]) == len(layers) - JOINED[name] * blocks > 0
    assert built["plugin_layers"] == built["plugin_nodes"]
    assert set(built["precision"]["products"].values()) >= {"int4 weights, plugin"}
    assert built["size"] == (ENGINES / f"{name}.engine").stat().st_size
    assert built["size"] > (ONNX / f"{name}.onnx.data").stat().st_size / 2


def test_the_engines_say_which_plugin_they_need() -> None:
    plugin = read_json(ENGINES / "engine.json")["plugin"]
    assert plugin["layout_version"] == LAYOUT_VERSION
    assert len(plugin["sha256"]) == 64


@pytest.mark.parametrize("name", JOINED)
def test_layers_of_3_bits_keep_3_in_the_engine(name: str) -> None:
    """W3A16, joined siblings included; the container of 4-bit codes stays behind in the exported graph."""
    built = read_json(DEMO / "w3/engines/engine.json")["graphs"][name]
    products = [kind for kind in built["precision"]["products"].values() if kind != "float16"]
    assert set(products) == {"int3 weights, plugin"}
    assert built["plugin_layers"] == built["plugin_nodes"] and len(products) == len(built["plugin_nodes"])


def test_no_quantized_layer_is_left_to_standard_operators() -> None:
    for built in read_json(ENGINES / "engine.json")["graphs"].values():
        assert "int4 weights, float16" not in json.dumps(built["precision"])
