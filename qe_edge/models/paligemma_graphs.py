"""The exported graphs of PaliGemma, whose parts are Gemma 3's."""

from __future__ import annotations

from typing import Any

from qe_edge.models.decoder import decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.gemma3_graphs import PictureDecoder, merger_graph, visual_graph
from qe_edge.models.softcap import head_of


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision = by_class["SiglipVisionModel"]
    return [
        visual_graph(vision),
        merger_graph(by_class["PaliGemmaMultiModalProjector"], vision),
        decoder_graph(PictureDecoder(model.get_decoder(), head_of(model))),
    ]
