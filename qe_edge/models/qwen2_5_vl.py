"""Qwen2.5-VL: as Qwen2-VL, but most of its vision blocks attend inside windows of 112 x 112 pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qe_edge.models.family import Encoded, GraphSpec
from qe_edge.models.qwen_vl import QwenVL
from qe_edge.models.qwen_vl_videos import Qwen25Videos
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from qe_edge.models import qwen2_5_vl_graphs, qwen_vl_pictures
    from qe_edge.models.graph_nodes import Nodes
else:
    qwen2_5_vl_graphs = lazy_module("qe_edge.models.qwen2_5_vl_graphs")
    qwen_vl_pictures = lazy_module("qe_edge.models.qwen_vl_pictures")


class Qwen25VL(QwenVL):
    """Qwen2.5-VL 3B, 7B, 32B and 72B and anything of the same architecture."""

    model_type = "qwen2_5_vl"
    groups = {  # noqa: RUF012
        "Qwen2_5_VLVisionBlock": "visual",
        "Qwen2_5_VLPatchMerger": "merger",
        "Qwen2_5_VLDecoderLayer": "language",
    }

    videos = Qwen25Videos
    counts_seconds = True

    def position_ids(self, encoded: Encoded) -> np.ndarray:
        """M-RoPE positions `[3, batch, sequence]`; a second of a video is `tokens_per_second` positions."""
        return self.runs.positions(encoded, self.config.vision_config.tokens_per_second)

    def frame_feeds(self, height: int, width: int) -> dict[str, np.ndarray]:
        """Which groups of patches stand in which window.

        `window_groups` int64 `[windows, places]`: the group at every place, 0 at those beyond the picture's edge.
        `group_places` int64 `[groups]`: the place of every group, counted through all windows.
        """
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        side = vision.window_size // merge // vision.patch_size
        rows, columns = height // merge, width // merge
        groups = np.full((-(-rows // side) * side, -(-columns // side) * side), -1, np.int64)
        groups[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
        windows = groups.reshape(-1, side, groups.shape[1] // side, side).transpose(0, 2, 1, 3).reshape(-1, side**2)
        places = np.flatnonzero(windows.ravel() >= 0)
        return {
            "window_groups": np.maximum(windows, 0),
            "group_places": places[np.argsort(windows.ravel()[places])],
        }

    def frame_nodes(self, write: Nodes, rows: ir.Value, columns: ir.Value) -> dict[str, ir.Value]:
        """`frame_feeds` as nodes."""
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        side = vision.window_size // merge // vision.patch_size
        return qwen_vl_pictures.window_nodes(write, rows, columns, merge, side)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over patches, merger, decoder with M-RoPE positions `[3, batch, sequence]`."""
        return qwen2_5_vl_graphs.graphs(model)
