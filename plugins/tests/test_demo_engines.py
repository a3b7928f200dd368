"""Rung 7: `qe-edge build --plugin` made engines of the exported demo; their layer lists show the plugin."""

from __future__ import annotations

import json

import pytest

from tests.demo import ENGINES, ONNX, graph, read_json

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
    assert plugin["layout_version"] == 2
    assert len(plugin["sha256"]) == 64


def test_no_quantized_layer_is_left_to_standard_operators() -> None:
    for built in read_json(ENGINES / "engine.json")["graphs"].values():
        assert "int4 weights, float16" not in json.dumps(built["precision"])
