"""Vision encoders of SigLIP's architecture, which many families have, as modules for any number of square tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.family import GraphSpec
from qe_edge.models.picture_attention import attend_all, attend_counted

LARGEST = 1 << 16  # tiles at export time
TYPICAL_TILES = 1


class SiglipEncoder(nn.Module):
    """Patches with learnt positions, encoder layers, last norm.

    Args:
        patch_embedding: The convolution over patches.
        positions: Learnt positions `[patches, width]` of a tile.
        layers: Encoder layers.
        norm: The last norm.

    Example:
        >>> encoder = SiglipEncoder(nn.Conv2d(3, 32, 16, stride=16), torch.zeros(4, 32), [], nn.LayerNorm(32))
        >>> tuple(encoder(torch.zeros(2, 3, 32, 32)).shape)  # two tiles of four patches
        (2, 4, 32)
    """

    def __init__(
        self, patch_embedding: nn.Module, positions: Tensor, layers: Sequence[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.patch_embedding = patch_embedding
        self.positions = nn.Buffer(positions)
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels `[tiles, channels, height, width]` to hidden states `[tiles, patches, width]`."""
        hidden = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            hidden = run_layer(layer, hidden)
        features: Tensor = self.norm(hidden)
        return features


def run_layer(layer: Any, hidden: Tensor, counted: Tensor | None = None) -> Tensor:  # noqa: ANN401 - of many classes
    """A layer on `[tiles, patches, width]`; patches attend to all of their tile, or to those that are `counted`.

    Example:
        >>> from transformers import SiglipVisionConfig
        >>> from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        >>> layer = SiglipEncoderLayer(SiglipVisionConfig(**sizes))
        >>> tuple(run_layer(layer, torch.zeros(1, 4, 32)).shape)
        (1, 4, 32)
    """
    hidden = hidden + attended(layer.self_attn, layer.layer_norm1(hidden), counted)
    output: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
    return output


def attended(attention: Any, x: Tensor, counted: Tensor | None = None) -> Tensor:  # noqa: ANN401 - of many classes
    """An attention of a layer on `[tiles, patches, width]`, with its projections.

    Args:
        attention: The layer.
        x: Its input.
        counted: `[tiles, patches]`, 0 on patches that nothing attends to and 1 on others; None where there are none.

    Example:
        >>> from transformers import SiglipVisionConfig
        >>> from transformers.models.siglip.modeling_siglip import SiglipAttention
        >>> attention = SiglipAttention(SiglipVisionConfig(hidden_size=32, num_attention_heads=2))
        >>> tuple(attended(attention, torch.zeros(1, 4, 32)).shape)
        (1, 4, 32)
    """
    heads = (*x.shape[:2], -1, attention.head_dim)
    query, key, value = (getattr(attention, f"{name}_proj")(x).reshape(heads) for name in "qkv")
    scale = attention.head_dim**-0.5
    if counted is None:
        mixed = attend_all(query, key, value, scale)
    else:
        mixed = attend_counted(query, key, value, scale, counted)
    projected: Tensor = attention.out_proj(mixed)
    return projected


def visual_graph(module: SiglipEncoder, side: int, tiles: int) -> GraphSpec:
    """The graph "visual" for up to `tiles` tiles of `side` pixels in engines.

    Example:
        >>> encoder = SiglipEncoder(nn.Conv2d(3, 32, 16, stride=16), torch.zeros(4, 32), [], nn.LayerNorm(32))
        >>> graph = visual_graph(encoder, side=32, tiles=4)
        >>> graph.input_names, graph.profiles["default"]["pixel_values"][2]  # the largest input of an engine
        (['pixel_values'], (4, 3, 32, 32))
    """
    shape = (3, side, side)
    return GraphSpec(
        name="visual",
        module=module,
        inputs=(torch.zeros(2, *shape),),
        input_names=["pixel_values"],
        output_names=["hidden_states"],
        dynamic_shapes=({0: Dim("tiles", min=1, max=LARGEST)},),
        profiles={"default": {"pixel_values": ((1, *shape), (TYPICAL_TILES, *shape), (tiles, *shape))}},
    )


def merger_graph(module: nn.Module, shape: tuple[int, int], tiles: int) -> GraphSpec:
    """The graph "merger" over hidden states `[tiles, patches, width]`, of which `shape` are the last two sizes.

    Example:
        >>> graph = merger_graph(nn.Linear(64, 32), shape=(16, 64), tiles=4)
        >>> graph.name, graph.input_names, graph.output_names
        ('merger', ['hidden_states'], ['image_features'])
    """
    return GraphSpec(
        name="merger",
        module=module,
        inputs=(torch.zeros(2, *shape),),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: Dim("tiles", min=1, max=LARGEST)},),
        profiles={"default": {"hidden_states": ((1, *shape), (TYPICAL_TILES, *shape), (tiles, *shape))}},
    )
