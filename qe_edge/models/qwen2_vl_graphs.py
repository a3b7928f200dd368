"""The exported graphs of Qwen2-VL."""

from __future__ import annotations

from typing import Any

from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.qwen_vl_graphs import Merger, PatchEncoder, merger_graph, visual_graph


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    visual = by_class["Qwen2VisionTransformerPretrainedModel"]
    return [
        visual_graph(PatchEncoder(visual)),
        merger_graph(Merger(visual), visual.spatial_merge_size**2, visual.config.embed_dim),
        decoder_graph(Decoder(by_class["Qwen2VLTextModel"], model.get_output_embeddings()), position_axes=3),
    ]
