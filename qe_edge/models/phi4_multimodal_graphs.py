"""Phi-4-multimodal's vision encoder and projections as modules for any number of crops and tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import Block, GraphSpec
from qe_edge.models.phi4_multimodal_projector import projector_of
from qe_edge.models.siglip_graphs import LARGEST, run_layer

MAX_CROPS, TYPICAL_CROPS = 16, 5  # of engines: pictures of 1920 x 1080 and of 640 x 480
LARGEST_TOKENS = 1 << 24  # at export time
EXAMPLE = 6  # tokens to trace with
LAYER = "Phi4MultimodalVisionEncoderLayer"
ALMOST = 1 - 1e-6  # transformers' own bound of a place


def blocks(model: Any) -> list[Block]:  # noqa: ANN401 - transformers' own class
    """Vision layers up to the one whose output is used, the projections, decoder layers."""
    found = [(type(module).__name__, name, module) for name, module in model.named_modules()]
    visual = [Block(name, module, "visual") for kind, name, module in found if kind == LAYER]
    language = [Block(name, module, "language") for kind, name, module in found if kind.endswith("DecoderLayer")]
    name, projector = projector_of(model)
    return [*visual[: used_layers(model.config.vision_config)], Block(name, projector, "merger"), *language]


def used_layers(vision: Any) -> int:  # noqa: ANN401 - transformers' configuration class
    """Number of layers up to the one whose output is used; `feature_layer` counts the first one's input too.

    Example:
        >>> from transformers import Phi4MultimodalVisionConfig
        >>> used_layers(Phi4MultimodalVisionConfig())  # of 27
        26
    """
    layer: int = vision.feature_layer
    return layer if layer >= 0 else vision.num_hidden_layers + 1 + layer


class CropEncoder(nn.Module):
    """Patches with learnt positions and encoder layers of a `Phi4MultimodalVisionModel`, pooled two by two.

    Args:
        embedding: The `Phi4MultimodalImageEmbedding` that holds the model and two learnt tokens.
    """

    def __init__(self, embedding: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        vision = embedding.img_processor
        self.patch_embedding, self.position_embedding = (
            getattr(vision.embeddings, name) for name in ("patch_embedding", "position_embedding")
        )
        self.side: int = vision.embeddings.num_patches_per_side
        # transformers' own bounds, rounded as torch does on this machine: a patch on a bound may have its neighbour's
        self.bounds = nn.Buffer(torch.arange(1 / self.side, 1.0, 1 / self.side))
        self.layers = vision.encoder.layers[: used_layers(vision.config)]
        learnt = (embedding.sub_img_feature_extensor, embedding.global_img_feature_extensor)
        self.learnt = nn.Buffer(torch.cat([token.detach().reshape(1, -1) for token in learnt]))

    def forward(self, pixel_values: Tensor, patch_mask: Tensor, token_places: Tensor) -> Tensor:
        """Hidden states of the tokens, `[tokens, width]`.

        Args:
            pixel_values: `[crops, channels, height, width]`.
            patch_mask: `[crops, patches, patches]`, 1 on patches of a picture and 0 on filling.
            token_places: `[tokens]` int64, 0 and 1 the learnt tokens, from 2 those of the crops.
        """
        hidden = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = hidden + self.position_embedding(self._positions(patch_mask))
        for layer in self.layers:
            hidden = run_layer(layer, hidden, patch_mask.flatten(1))
        half, width = self.side // 2, hidden.shape[-1]
        pooled = hidden.reshape(-1, half, 2, half, 2, width).mean((2, 4)).reshape(-1, width)
        tokens: Tensor = torch.cat([self.learnt, pooled])[token_places]
        return tokens

    def _positions(self, mask: Tensor) -> Tensor:
        """Numbers of learnt positions `[crops, patches]`: the picture's part of a crop is stretched to all of them."""
        index = torch.arange(self.side, dtype=torch.float32)
        shares = [index * (1.0 / count[:, None]) for count in (mask[:, :, 0].sum(1), mask[:, 0, :].sum(1))]
        down, across = ((share.clamp(max=ALMOST)[..., None] >= self.bounds).to(torch.int64).sum(-1) for share in shares)
        return ((down[:, :, None] * self.side + across[:, None, :]) * mask.to(torch.int64)).flatten(1)


class Merger(nn.Module):
    """The projections, whose linear layers see rank 3."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens `[tokens, width]` to features `[tokens, hidden]`."""
        features: Tensor = self.projector(hidden_states.unsqueeze(0))
        return features.squeeze(0)


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    name, projector = projector_of(model)
    embedding: Any = model.get_submodule(name)
    encoder, size = CropEncoder(embedding), embedding.crop_size
    per_crop = (encoder.side // 2) ** 2 + encoder.side // 2  # each line with its end

    def shapes(crops: int, tokens: int) -> dict[str, tuple[int, ...]]:
        return {
            "pixel_values": (crops, 3, size, size),
            "patch_mask": (crops, encoder.side, encoder.side),
            "token_places": (tokens,),
        }

    sizes = [(1, 1), *((crops, crops * per_crop) for crops in (TYPICAL_CROPS, MAX_CROPS))]
    smallest, typical, largest = (shapes(*size) for size in sizes)
    crops, tokens = Dim("crops", min=1, max=LARGEST), Dim("tokens", min=1, max=LARGEST_TOKENS)
    example = shapes(2, EXAMPLE)
    width = embedding.image_dim_out
    visual = GraphSpec(
        name="visual",
        module=encoder,
        inputs=(
            torch.zeros(example["pixel_values"]),
            torch.ones(example["patch_mask"]),
            torch.zeros(EXAMPLE, dtype=torch.int64),
        ),
        input_names=list(example),
        output_names=["hidden_states"],
        dynamic_shapes=({0: crops}, {0: crops}, {0: tokens}),
        profiles={"default": {key: (smallest[key], typical[key], largest[key]) for key in example}},
    )
    merger = GraphSpec(
        name="merger",
        module=Merger(projector),
        inputs=(torch.zeros(EXAMPLE, width),),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: tokens},),
        profiles={"default": {"hidden_states": ((1, width), *((count, width) for _, count in sizes[1:]))}},  # type: ignore[dict-item] # three of three
    )
    return [visual, merger, decoder_graph(Decoder(model.get_decoder(), model.get_output_embeddings()))]
