"""Qwen3-VL: as Qwen2-VL, with learnt positions, and features of earlier vision blocks for the first decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.models.chat import Rewrite, as_it_is, filled_places
from qe_edge.models.family import Block, GraphSpec
from qe_edge.models.qwen_vl import QwenVL, in_groups
from qe_edge.models.qwen_vl_videos import Qwen3Videos
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from qe_edge.models import qwen3_vl_graphs, qwen_vl_pictures
    from qe_edge.models.graph_nodes import Nodes
else:
    qwen3_vl_graphs = lazy_module("qe_edge.models.qwen3_vl_graphs")
    qwen_vl_pictures = lazy_module("qe_edge.models.qwen_vl_pictures")


class Qwen3VL(QwenVL):
    """Qwen3-VL 2B, 4B, 8B and 32B, Cosmos-Reason2, and anything of the same architecture.

    Some vision blocks have a merger of their own, whose features are added after the first decoder layers (DeepStack,
    Meng et al. 2024). In exported graphs they follow the merger's own along the features' width.
    """

    model_type = "qwen3_vl"
    groups = {  # noqa: RUF012
        "Qwen3VLVisionBlock": "visual",
        "Qwen3VLVisionPatchMerger": "merger",
        "Qwen3VLTextDecoderLayer": "language",
    }

    videos = Qwen3Videos
    times_apart = True

    def with_times(self, tokenizer: Any, times: Sequence[Sequence[float]]) -> Rewrite:  # noqa: ANN401
        """Before every step of time of a video stands when it was taken, in words."""
        config = self.config
        start, token, end = tokenizer.convert_ids_to_tokens(
            [config.vision_start_token_id, config.video_token_id, config.vision_end_token_id]
        )

        spans = ["".join(f"<{time:.1f} seconds>{start}{token}{end}" for time in video) for video in times]
        return (lambda prompt: filled_places(prompt, token, spans)) if times else as_it_is

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Every merger comes after the vision block that it reads; features are added between the first layers."""
        found = super().blocks(model)
        visual, mergers, language = (
            [block for block in found if block.group == group] for group in ("visual", "merger", "language")
        )
        taps = self.config.vision_config.deepstack_visual_indexes
        own = {
            tap: next(b for b in mergers if b.name.endswith(f"deepstack_merger_list.{i}")) for i, tap in enumerate(taps)
        }
        ordered: list[Block] = []
        for number, block in enumerate(visual):
            ordered += [block, own[number]] if number in own else [block]
        # a merger after the last vision block would feed the main one, were they one chain
        ordered = [Block(b.name, b.module, b.group, ends_chain=b.group == "merger") for b in ordered]
        ordered += [merger for merger in mergers if merger not in own.values()]
        return ordered + [
            Block(b.name, b.module, b.group, ends_chain=number < len(taps)) for number, b in enumerate(language)
        ]

    def frame_feeds(self, height: int, width: int) -> dict[str, np.ndarray]:
        """How the learnt grid of positions is stretched over the picture, linearly between its points.

        `grid_points` int64 and `grid_weights` float32, both `[groups, patches, 4]`: the four points around a patch.
        """
        vision = self.config.vision_config
        side = int(vision.num_position_embeddings**0.5)
        rows, row_weights = _between(height, side)
        columns, column_weights = _between(width, side)
        points = rows[:, None, :, None] * side + columns[None, :, None, :]
        weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
        merge = vision.spatial_merge_size
        return {
            "grid_points": in_groups(points.reshape(height, width, 4).transpose(2, 0, 1), merge),
            "grid_weights": in_groups(weights.reshape(height, width, 4).transpose(2, 0, 1), merge),
        }

    def frame_nodes(self, write: Nodes, rows: ir.Value, columns: ir.Value) -> dict[str, ir.Value]:
        """`frame_feeds` as nodes."""
        vision = self.config.vision_config
        side = int(vision.num_position_embeddings**0.5)
        return qwen_vl_pictures.grid_nodes(write, rows, columns, vision.spatial_merge_size, side)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over patches, all mergers, decoder with M-RoPE positions `[3, batch, sequence]`."""
        return qwen3_vl_graphs.graphs(model)


def _between(size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """For `size` patches the two neighbours among `side` points, and their weights float32: both `[size, 2]`.

    The first patch lies on the first point, the last on the last.
    """
    place = np.arange(size, dtype=np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    below = np.floor(place)
    neighbours = below.astype(np.int64)[:, None] + np.arange(2)
    distance = np.abs(place[:, None] - below[:, None] - np.arange(2, dtype=np.float32))
    return np.clip(neighbours, 0, side - 1), np.maximum(1 - distance, np.float32(0))
