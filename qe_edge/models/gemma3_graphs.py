"""Gemma 3's vision encoder, projector, and decoder in which the tokens of a picture see each other."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qe_edge.models import siglip_graphs
from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.siglip_graphs import SiglipEncoder
from qe_edge.models.softcap import head_of

MAX_PICTURES = 4  # of engines, in a batch


class PictureDecoder(Decoder):
    """A `Gemma3TextModel` whose mask numbers pictures from 2: 0 is padding, 1 text."""

    pictures = True


class Projector(nn.Module):
    """A `Gemma3MultiModalProjector`."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches `[pictures, patches, width]` to features `[pictures * tokens, hidden]`."""
        features: Tensor = self.projector(hidden_states)
        return features.flatten(0, 1)


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision = by_class["SiglipVisionModel"]
    return [
        visual_graph(vision),
        merger_graph(by_class["Gemma3MultiModalProjector"], vision),
        decoder_graph(PictureDecoder(by_class["Gemma3TextModel"], head_of(model))),
    ]


def visual_graph(vision: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual"."""
    embeddings = vision.embeddings
    positions = embeddings.position_embedding.weight.detach()
    module = SiglipEncoder(embeddings.patch_embedding, positions, vision.encoder.layers, vision.post_layernorm)
    return siglip_graphs.visual_graph(module, embeddings.image_size, MAX_PICTURES)


def merger_graph(projector: nn.Module, vision: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "merger"."""
    shape = (vision.embeddings.num_patches, vision.config.hidden_size)
    return siglip_graphs.merger_graph(Projector(projector), shape, MAX_PICTURES)
