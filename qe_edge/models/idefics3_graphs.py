"""The vision encoder and the connector of Idefics3 and SmolVLM as modules for any number of tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.models import siglip_graphs
from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.internvl_graphs import pixel_shuffle
from qe_edge.models.siglip_graphs import SiglipEncoder

MAX_TILES = 17  # of engines: a picture in four by four tiles and its overview


class Connector(nn.Module):
    """Pixel shuffle and projection of an `Idefics3Connector` or `SmolVLMConnector`."""

    def __init__(self, connector: Any) -> None:  # noqa: ANN401 - transformers' own classes
        super().__init__()
        self.projection = connector.modality_projection
        self.factor = connector.scale_factor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches `[tiles, patches, width]` to features `[tiles * tokens, hidden]`."""
        features: Tensor = self.projection(pixel_shuffle(hidden_states, self.factor))
        return features.flatten(0, 1)


def graphs(model: Any, prefix: str) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model whose classes' names begin with `prefix`."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision = by_class[f"{prefix}VisionTransformer"]
    return [
        visual_graph(vision),
        merger_graph(by_class[f"{prefix}Connector"], vision),
        decoder_graph(Decoder(by_class[f"{prefix}Model"].text_model, model.get_output_embeddings())),
    ]


def visual_graph(vision: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own classes
    """The graph "visual"."""
    embeddings = vision.embeddings
    positions = embeddings.position_embedding.weight[_places(embeddings.num_patches_per_side)].detach()
    module = SiglipEncoder(embeddings.patch_embedding, positions, vision.encoder.layers, vision.post_layernorm)
    return siglip_graphs.visual_graph(module, embeddings.image_size, MAX_TILES)


def merger_graph(connector: Any, vision: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own classes
    """The graph "merger"."""
    shape = (vision.embeddings.num_patches, vision.config.hidden_size)
    return siglip_graphs.merger_graph(Connector(connector), shape, MAX_TILES)


def _places(side: int) -> Tensor:
    """Which learnt position each of `side` x `side` patches has: that of its place in the whole.

    transformers finds it among bounds in float32, so that a patch may have its neighbour's.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    place = torch.clamp(torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side)), max=1.0 - 1e-6)
    found = torch.bucketize(place, bounds, right=True)
    return (found[:, None] * side + found[None, :]).flatten()
