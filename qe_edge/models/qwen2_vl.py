"""Qwen2-VL: vision transformer over patches of any image size, 2x2 patch merger, Qwen2 language model with M-RoPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qe_edge.models.family import GraphSpec
from qe_edge.models.qwen_vl import QwenVL

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Qwen2VL(QwenVL):
    """Qwen2-VL 2B, 7B and 72B and anything of the same architecture."""

    model_type = "qwen2_vl"
    groups = {"Qwen2VLVisionBlock": "visual", "PatchMerger": "merger", "Qwen2VLDecoderLayer": "language"}  # noqa: RUF012

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over patches, merger, decoder with M-RoPE positions `[3, batch, sequence]`."""
        from qe_edge.models.decoder import Decoder, decoder_graph
        from qe_edge.models.qwen_vl_graphs import Merger, PatchEncoder, merger_graph, visual_graph

        by_class: dict[str, Any] = {type(module).__name__: module for module in model.modules()}
        visual = by_class["Qwen2VisionTransformerPretrainedModel"]
        return [
            visual_graph(PatchEncoder(visual)),
            merger_graph(Merger(visual), visual.spatial_merge_size**2, visual.config.embed_dim),
            decoder_graph(Decoder(by_class["Qwen2VLTextModel"], model.get_output_embeddings()), position_axes=3),
        ]
