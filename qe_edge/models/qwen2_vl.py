"""Qwen2-VL: vision transformer over patches of any image size, 2x2 patch merger, Qwen2 language model with M-RoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qe_edge.models.family import GraphSpec
from qe_edge.models.qwen_vl import QwenVL
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import qwen2_vl_graphs
else:
    qwen2_vl_graphs = lazy_module("qe_edge.models.qwen2_vl_graphs")


class Qwen2VL(QwenVL):
    """Qwen2-VL 2B, 7B and 72B and anything of the same architecture."""

    model_type = "qwen2_vl"
    groups = {"Qwen2VLVisionBlock": "visual", "PatchMerger": "merger", "Qwen2VLDecoderLayer": "language"}  # noqa: RUF012

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over patches, merger, decoder with M-RoPE positions `[3, batch, sequence]`."""
        return qwen2_vl_graphs.graphs(model)
