"""LLaVA-OneVision's vision encoder, projector and ends of lines as modules for any number of tiles and tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.anyres import NEIGHBOURS
from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.siglip_graphs import LARGEST, TYPICAL_TILES, SiglipEncoder

MAX_TILES = 16  # of engines: a picture of 1920 x 1080 in three by five tiles, and its overview
LARGEST_TOKENS = 1 << 24  # at export time
EXAMPLE = 5  # tokens to trace with

Size = tuple[int, ...]


class TokenEncoder(nn.Module):
    """A `SiglipVisionModel` without its last norm, and the choice of the patches that become tokens."""

    def __init__(self, vision: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        embeddings = vision.embeddings
        positions = embeddings.position_embedding.weight.detach()
        self.encoder = SiglipEncoder(embeddings.patch_embedding, positions, vision.encoder.layers, nn.Identity())

    def forward(self, pixel_values: Tensor, token_places: Tensor, token_weights: Tensor) -> Tensor:
        """Hidden states of the patches that every token is made of, and their weights: `[tokens, taps, width + 1]`.

        Args:
            pixel_values: `[tiles, channels, height, width]`.
            token_places: `[tokens, taps]` int64, numbers of patches, counted through all tiles.
            token_weights: `[tokens, taps]`.
        """
        hidden: Tensor = self.encoder(pixel_values).flatten(0, 1)
        return torch.cat([hidden[token_places], token_weights[..., None]], dim=-1)


class Projector(nn.Module):
    """A `LlavaOnevisionMultiModalProjector`, and the token that ends a line."""

    def __init__(self, projector: nn.Module, line_end: Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.line_end = nn.Buffer(line_end.detach())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[tokens, taps, width + 1]` to features `[tokens, hidden]`; the end of a line has what is left of 1."""
        weights = hidden_states[..., -1:]
        projected: Tensor = self.projector(hidden_states[..., :-1])
        return (projected * weights).sum(1) + (1 - weights.sum(1)) * self.line_end


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision, line_end = by_class["SiglipVisionModel"], by_class["LlavaOnevisionModel"].image_newline
    return [
        visual_graph(vision),
        merger_graph(by_class["LlavaOnevisionMultiModalProjector"], line_end, vision),
        decoder_graph(Decoder(model.get_decoder(), model.get_output_embeddings())),
    ]


def visual_graph(vision: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual"."""
    side = vision.embeddings.image_size
    tokens, taps = Dim("tokens", min=1, max=LARGEST_TOKENS), Dim("taps", min=1, max=NEIGHBOURS)
    shapes = _token_shapes(vision)
    return GraphSpec(
        name="visual",
        module=TokenEncoder(vision),
        inputs=(
            torch.zeros(2, 3, side, side),
            torch.zeros(EXAMPLE, NEIGHBOURS, dtype=torch.int64),
            torch.zeros(EXAMPLE, NEIGHBOURS),
        ),
        input_names=["pixel_values", "token_places", "token_weights"],
        output_names=["hidden_states"],
        dynamic_shapes=({0: Dim("tiles", min=1, max=LARGEST)}, {0: tokens, 1: taps}, {0: tokens, 1: taps}),
        profiles={
            "default": {
                "pixel_values": ((1, 3, side, side), (TYPICAL_TILES, 3, side, side), (MAX_TILES, 3, side, side)),
                "token_places": shapes,
                "token_weights": shapes,
            }
        },
    )


def merger_graph(projector: nn.Module, line_end: Tensor, vision: Any) -> GraphSpec:  # noqa: ANN401
    """The graph "merger"; `line_end` is the model's `image_newline`."""
    width = vision.config.hidden_size + 1
    smallest, typical, largest = _token_shapes(vision)
    return GraphSpec(
        name="merger",
        module=Projector(projector, line_end),
        inputs=(torch.zeros(EXAMPLE, NEIGHBOURS, width),),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: Dim("tokens", min=1, max=LARGEST_TOKENS), 1: Dim("taps", min=1, max=NEIGHBOURS)},),
        profiles={"default": {"hidden_states": ((*smallest, width), (*typical, width), (*largest, width))}},
    )


def _token_shapes(vision: Any) -> tuple[Size, Size, Size]:  # noqa: ANN401
    """Smallest, typical and largest `[tokens, taps]` of engines: the tiles' patches, each row with its end."""
    patches = vision.embeddings.num_patches
    with_ends = patches + round(patches**0.5)
    return (1, 1), (TYPICAL_TILES * with_ends, 1), (MAX_TILES * with_ends, NEIGHBOURS)
