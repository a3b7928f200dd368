"""InternVL's vision encoder and projector as modules for any number of tiles; the size of a tile is fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec

TYPICAL_TILES = 1
MAX_TILES = 13  # of engines: one picture in twelve tiles and its thumbnail
LARGEST = 1 << 16  # tiles at export time


class VisionEncoder(nn.Module):
    """Patch embedding, vision layers and last norm of an `InternVLVisionModel`."""

    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.embeddings = vision.embeddings
        self.encoder = vision.encoder
        self.layernorm = vision.layernorm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels `[tiles, channels, height, width]` to hidden states of the patches `[tiles, patches, width]`."""
        vision: Any = self
        hidden = vision.embeddings(pixel_values)
        for layer in vision.encoder.layer:
            hidden = layer(hidden)
        features: Tensor = vision.layernorm(hidden)[:, 1:]  # the first token stands for the tile as a whole
        return features


class Projector(nn.Module):
    """Pixel shuffle and `InternVLMultiModalProjector`.

    Args:
        projector: The model's projector.
        factor: Patches per side of the square that becomes one token.
    """

    def __init__(self, projector: nn.Module, factor: int) -> None:
        super().__init__()
        self.projector = projector
        self.factor = factor

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches `[tiles, patches, width]` to features `[tiles * tokens, hidden]`."""
        features: Tensor = self.projector(pixel_shuffle(hidden_states, self.factor))
        return features.flatten(0, 1)


def pixel_shuffle(hidden: Tensor, factor: int) -> Tensor:
    """Gather `factor` x `factor` neighbours: `[tiles, n * n, c]` to `[tiles, (n / factor)^2, c * factor^2]`.

    The same as `InternVLModel.pixel_shuffle`, with its order of rows, columns and channels.
    """
    patches, width = hidden.shape[1], hidden.shape[2]
    side = round(patches**0.5)
    blocks = hidden.reshape(-1, side // factor, factor, side // factor, factor, width)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(-1, patches // factor**2, width * factor**2)


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    return [
        visual_graph(by_class["InternVLVisionModel"]),
        merger_graph(by_class["InternVLMultiModalProjector"], model.config),
        decoder_graph(Decoder(model.get_decoder(), model.get_output_embeddings())),
    ]


def visual_graph(vision: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual"."""
    shape = (vision.config.num_channels, *vision.config.image_size)
    return GraphSpec(
        name="visual",
        module=VisionEncoder(vision),
        inputs=(torch.zeros(2, *shape),),
        input_names=["pixel_values"],
        output_names=["hidden_states"],
        dynamic_shapes=({0: Dim("tiles", min=1, max=LARGEST)},),
        profiles={"default": {"pixel_values": ((1, *shape), (TYPICAL_TILES, *shape), (MAX_TILES, *shape))}},
    )


def merger_graph(projector: nn.Module, config: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "merger"; `config` is the whole model's."""
    factor = round(1 / config.downsample_ratio)
    shape = (config.image_seq_length * factor**2, config.vision_config.hidden_size)
    return GraphSpec(
        name="merger",
        module=Projector(projector, factor),
        inputs=(torch.zeros(2, *shape),),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: Dim("tiles", min=1, max=LARGEST)},),
        profiles={"default": {"hidden_states": ((1, *shape), (TYPICAL_TILES, *shape), (MAX_TILES, *shape))}},
    )
