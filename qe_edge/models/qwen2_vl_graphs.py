"""Qwen2-VL's visual encoder and merger as modules that `torch.export` can trace for any set of picture sizes.

transformers' own encoder loops over pictures, which depends on data. Here one attention over all patches with a mask
of segments does the same, and what follows from the picture sizes comes in as inputs. Patches come in groups of those
that the merger joins, so that any number of groups is a valid size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import linear, softmax
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from qe_edge.models.family import GraphSpec

TYPICAL_PATCHES = 1024
MAX_PATCHES = 11264  # of engines: a picture of 1920 x 1080 has 10764; all attend to each other: it bounds memory
LARGEST = 1 << 18  # groups at export time
EXAMPLE = 4  # groups to trace with; not 1, which torch would take for a constant


class VisualEncoder(nn.Module):
    """Patch embedding and vision blocks of a `Qwen2VisionTransformerPretrainedModel`."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.patch_embed = visual.patch_embed
        self.rotary_pos_emb = visual.rotary_pos_emb
        self.blocks = visual.blocks

    def forward(self, pixel_values: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Hidden states `[groups, patches of a group, embed_dim]`.

        Args:
            pixel_values: `[groups, patches of a group, channels * frames * height * width]`.
            position_ids: `[groups, patches of a group, 2]`, row and column of every patch.
            segment_ids: `[groups]`; patches of one segment attend to each other.
        """
        patch_embed: Any = self.patch_embed
        rotary_embedding: Any = self.rotary_pos_emb
        blocks: Any = self.blocks
        # the convolution's kernel covers a patch exactly, so it is a matrix product
        hidden = linear(pixel_values, patch_embed.proj.weight.flatten(1), patch_embed.proj.bias)
        group = hidden.shape[1:]
        hidden = hidden.flatten(0, 1).unsqueeze(0)
        rotary = rotary_embedding(hidden, position_ids.flatten(0, 1))
        segments = segment_ids[:, None].expand(-1, group[0]).flatten()
        same = segments[:, None] == segments[None, :]
        mask = torch.where(same, 0.0, torch.finfo(hidden.dtype).min)
        for block in blocks:
            hidden = hidden + attend(block.attn, block.norm1(hidden), rotary, mask)
            hidden = hidden + block.mlp(block.norm2(hidden))
        return hidden.view(-1, *group)


class Merger(nn.Module):
    """A `PatchMerger` whose linear layers see rank 3."""

    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches `[groups, patches of a group, embed_dim]` to features `[groups, hidden]`."""
        merger: Any = self.merger
        merged: Tensor = merger.mlp(merger.ln_q(hidden_states).view(1, -1, merger.hidden_size))
        return merged.squeeze(0)


def attend(attention: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:  # noqa: ANN401
    """`VisionAttention` on `[1, patches, dim]` with an additive mask `[patches, patches]`."""
    parts = attention.qkv(hidden).reshape(hidden.shape[1], 3, attention.num_heads, attention.head_dim)
    query, key, value = parts.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))  # [heads, patches, head_dim]
    scores = query @ key.transpose(1, 2) * attention.scaling + mask
    mixed = softmax(scores, dim=-1) @ value
    output: Tensor = attention.proj(mixed.transpose(0, 1).reshape(1, -1, attention.dim))
    return output


def visual_graph(visual: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual"."""
    merge = visual.spatial_merge_size**2
    groups = Dim("groups", min=1, max=LARGEST)
    values = visual.patch_embed.proj.weight[0].numel()
    typical, largest = TYPICAL_PATCHES // merge, MAX_PATCHES // merge
    return GraphSpec(
        name="visual",
        module=VisualEncoder(visual),
        inputs=(
            torch.zeros(EXAMPLE, merge, values),
            torch.zeros(EXAMPLE, merge, 2, dtype=torch.int64),
            torch.zeros(EXAMPLE, dtype=torch.int64),
        ),
        input_names=["pixel_values", "position_ids", "segment_ids"],
        output_names=["hidden_states"],
        dynamic_shapes=({0: groups}, {0: groups}, {0: groups}),
        profiles={
            "default": {
                "pixel_values": ((1, merge, values), (typical, merge, values), (largest, merge, values)),
                "position_ids": ((1, merge, 2), (typical, merge, 2), (largest, merge, 2)),
                "segment_ids": ((1,), (typical,), (largest,)),
            }
        },
    )


def merger_graph(visual: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "merger"."""
    merge = visual.spatial_merge_size**2
    width = visual.patch_embed.proj.weight.shape[0]
    typical, largest = TYPICAL_PATCHES // merge, MAX_PATCHES // merge
    return GraphSpec(
        name="merger",
        module=Merger(visual.merger),
        inputs=(torch.zeros(EXAMPLE, merge, width),),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: Dim("groups", min=1, max=LARGEST)},),
        profiles={"default": {"hidden_states": ((1, merge, width), (typical, merge, width), (largest, merge, width))}},
    )
