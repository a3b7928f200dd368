"""Visual encoders and mergers of the Qwen-VL families as modules that `torch.export` can trace for any picture size.

One picture, or one frame of a video, goes through the encoder at a time, so nothing has to be masked. What follows from
its size comes in as inputs. Patches come in groups of those that the merger joins, so that any number of groups is a
valid size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.functional import linear
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from qe_edge.models.family import GraphSpec
from qe_edge.models.picture_attention import attend_all

TYPICAL_PATCHES = 1024
MAX_PATCHES = 11264  # of a picture in engines: one of 1920 x 1080 has 10764
LARGEST = 1 << 18  # groups at export time
EXAMPLE = 4  # groups to trace with; not 1, which torch would take for a constant

Size = tuple[int, ...]


class PatchEncoder(nn.Module):
    """Patch embedding and vision blocks of a Qwen-VL model, for one picture."""

    def __init__(self, visual: Any) -> None:  # noqa: ANN401 - transformers' own classes
        super().__init__()
        self.patch_embed = visual.patch_embed
        self.rotary_pos_emb = visual.rotary_pos_emb
        self.blocks = visual.blocks
        self.merge = visual.spatial_merge_size**2

    def forward(self, pixel_values: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states `[groups, patches of a group, width]`.

        Args:
            pixel_values: `[groups, patches of a group, channels * frames * height * width]`.
            position_ids: `[groups, patches of a group, 2]`, row and column of every patch.
        """
        hidden = self.embed(pixel_values)
        rotary = self.rotary(hidden, position_ids)
        blocks: Any = self.blocks
        for block in blocks:
            hidden = run_block(block, hidden, rotary)
        return self.grouped(hidden)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Embedded patches `[1, patches, width]`: the convolution covers a patch exactly, so it is a matrix product."""
        proj: Any = self.patch_embed.proj
        return linear(pixel_values, proj.weight.flatten(1), proj.bias).flatten(0, 1).unsqueeze(0)

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[patches, head_dim]`."""
        rotary_pos_emb: Any = self.rotary_pos_emb
        cos, sin = rotary_pos_emb(hidden, position_ids.flatten(0, 1))
        return cos, sin

    def grouped(self, hidden: Tensor) -> Tensor:
        """`[1, patches, width]` as `[groups, patches of a group, width]`."""
        return hidden.view(-1, self.merge, hidden.shape[-1])


class Merger(nn.Module):
    """The patch merger of a Qwen2-VL or Qwen2.5-VL model; its linear layers see rank 3."""

    def __init__(self, visual: Any) -> None:  # noqa: ANN401 - transformers' own classes
        super().__init__()
        self.merger = visual.merger

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches `[groups, patches of a group, width]` to features `[groups, hidden]`."""
        merger: Any = self.merger
        merged: Tensor = merger.mlp(merger.ln_q(hidden_states).view(1, -1, merger.hidden_size))
        return merged.squeeze(0)


def run_block(block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Any = attend_all) -> Tensor:  # noqa: ANN401
    """A vision block on `[1, patches, width]`; `attend` is `attend_all` or takes and returns the same."""
    attention = block.attn
    parts = attention.qkv(block.norm1(hidden)).reshape(1, -1, 3, attention.num_heads, attention.head_dim)
    query, key, value = parts.unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
    hidden = hidden + attention.proj(attend(query, key, value, attention.scaling))
    output: Tensor = hidden + block.mlp(block.norm2(hidden))
    return output


@dataclass(frozen=True)
class Input:
    """A further input of a visual encoder.

    Attributes:
        example: To trace with.
        shapes: Smallest, typical and largest shape that engines are built for.
        counts: What its first axis counts: "groups", as that of the others does, or something of its own.
    """

    example: Tensor
    shapes: tuple[Size, Size, Size]
    counts: str = "groups"


def visual_graph(module: PatchEncoder, further: Mapping[str, Input] | None = None) -> GraphSpec:
    """The graph "visual"; `further` are the inputs after `pixel_values` and `position_ids`, by name."""
    proj: Any = module.patch_embed.proj
    inputs = {
        "pixel_values": per_group(torch.zeros(EXAMPLE, module.merge, proj.weight[0].numel())),
        "position_ids": per_group(torch.zeros(EXAMPLE, module.merge, 2, dtype=torch.int64)),
        **(further or {}),
    }
    dims = {name: Dim(name, min=1, max=LARGEST) for name in sorted({found.counts for found in inputs.values()})}
    return GraphSpec(
        name="visual",
        module=module,
        inputs=tuple(found.example for found in inputs.values()),
        input_names=list(inputs),
        output_names=["hidden_states"],
        dynamic_shapes=tuple({0: dims[found.counts]} for found in inputs.values()),
        profiles={"default": {name: found.shapes for name, found in inputs.items()}},
    )


def merger_graph(module: nn.Module, patches: int, width: int) -> GraphSpec:
    """The graph "merger" over hidden states `[groups, patches of a group, width]`."""
    states = per_group(torch.zeros(EXAMPLE, patches, width))
    return GraphSpec(
        name="merger",
        module=module,
        inputs=(states.example,),
        input_names=["hidden_states"],
        output_names=["image_features"],
        dynamic_shapes=({0: Dim("groups", min=1, max=LARGEST)},),
        profiles={"default": {"hidden_states": states.shapes}},
    )


def per_group(example: Tensor) -> Input:
    """An input whose first axis counts groups and whose second counts the patches of one."""
    rest = tuple(example.shape[1:])
    return Input(example, ((1, *rest), (TYPICAL_PATCHES // rest[0], *rest), (MAX_PATCHES // rest[0], *rest)))
