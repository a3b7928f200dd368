"""Qwen2.5-VL's visual encoder: attention in windows, and over the whole picture in a few blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qe_edge.models import qwen_vl_graphs
from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import GraphSpec
from qe_edge.models.picture_attention import attend_masked
from qe_edge.models.qwen_vl_graphs import EXAMPLE, MAX_PATCHES, TYPICAL_PATCHES, Input, Merger, merger_graph, run_block

EXAMPLE_WINDOWS = 3


class WindowedEncoder(qwen_vl_graphs.PatchEncoder):
    """Patch embedding and vision blocks of a `Qwen2_5_VisionTransformerPretrainedModel`, for one picture.

    transformers brings the patches into the windows' order. Here they keep theirs, and only the keys, queries and
    values of windowed blocks are moved.
    """

    def __init__(self, visual: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__(visual)
        self.full = set(visual.fullatt_block_indexes)

    def forward(  # type: ignore[override] # it takes more
        self, pixel_values: Tensor, position_ids: Tensor, window_groups: Tensor, group_places: Tensor
    ) -> Tensor:
        """Hidden states `[groups, patches of a group, width]`.

        Args:
            pixel_values: As for `PatchEncoder`.
            position_ids: As for `PatchEncoder`.
            window_groups: `[windows, places]` int64, the group at every place of every window; any where there is none.
            group_places: `[groups]` int64, the place of every group, counted through all windows.
        """
        hidden = self.embed(pixel_values)
        rotary = self.rotary(hidden, position_ids)
        # a place holds a group if that group is at this place
        place = torch.arange(window_groups.shape[0] * window_groups.shape[1]).reshape(window_groups.shape)
        held = (group_places[window_groups] == place).repeat_interleave(self.merge, dim=1)
        mask = torch.where(held, 0.0, torch.finfo(hidden.dtype).min)[:, None, None, :]

        def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            query, key, value = (self._to_windows(part, window_groups) for part in (query, key, value))
            mixed = attend_masked(query, key, value, scale, mask)
            grouped = mixed.reshape(-1, self.merge, mixed.shape[-1])[group_places]
            return grouped.flatten(0, 1).unsqueeze(0)

        blocks: Any = self.blocks
        for number, block in enumerate(blocks):
            hidden = (
                run_block(block, hidden, rotary) if number in self.full else run_block(block, hidden, rotary, attend)
            )
        return self.grouped(hidden)

    def _to_windows(self, part: Tensor, window_groups: Tensor) -> Tensor:
        """`[1, patches, heads, head_dim]` as `[windows, patches of a window, heads, head_dim]`."""
        grouped = part.reshape(-1, self.merge, *part.shape[2:])
        return grouped[window_groups].flatten(1, 2)


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    visual = by_class["Qwen2_5_VisionTransformerPretrainedModel"]
    return [
        visual_graph(visual),
        merger_graph(Merger(visual), visual.spatial_merge_size**2, visual.config.hidden_size),
        decoder_graph(Decoder(by_class["Qwen2_5_VLTextModel"], model.get_output_embeddings()), position_axes=3),
    ]


def visual_graph(visual: Any) -> GraphSpec:  # noqa: ANN401 - transformers' own class
    """The graph "visual"."""
    merge = visual.spatial_merge_size
    side = visual.window_size // merge // visual.patch_size
    typical, largest = (patches // merge**2 for patches in (TYPICAL_PATCHES, MAX_PATCHES))
    # no picture of g groups has more than g / side windows
    shapes = ((1, side**2), (-(-typical // side), side**2), (-(-largest // side), side**2))
    further = {
        "window_groups": Input(torch.zeros(EXAMPLE_WINDOWS, side**2, dtype=torch.int64), shapes, "windows"),
        "group_places": Input(torch.zeros(EXAMPLE, dtype=torch.int64), ((1,), (typical,), (largest,))),
    }
    return qwen_vl_graphs.visual_graph(WindowedEncoder(visual), further)
