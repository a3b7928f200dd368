"""Qwen3.5's graphs: those of Qwen3-VL without taps."""

from __future__ import annotations

from typing import Any

from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.qwen3_vl_graphs import merger_graph, visual_graph


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    visual = by_class["Qwen3_5VisionModel"]
    decoder = Decoder(by_class["Qwen3_5TextModel"], model.get_output_embeddings())
    return [visual_graph(visual), merger_graph(visual), decoder_graph(decoder, position_axes=3)]
