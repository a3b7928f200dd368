"""Qwen3.5: Qwen3-VL's vision encoder without its taps, and a decoder most of whose layers are gated delta rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from qe_edge.models.causal_lm import CausalLM
from qe_edge.models.family import Block, GraphSpec
from qe_edge.models.qwen3_vl import Qwen3VL
from qe_edge.models.qwen_vl import QwenVL
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import qwen3_5_graphs
else:
    qwen3_5_graphs = lazy_module("qe_edge.models.qwen3_5_graphs")

SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)


class Qwen35Text(CausalLM):
    """A language model three of four layers of which keep a matrix for each head instead of keys and values.

    Example:
        >>> from transformers import Qwen3_5TextConfig
        >>> Qwen35Text(Qwen3_5TextConfig()).model_type
        'qwen3_5_text'
    """

    model_type = "qwen3_5_text"
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = SIBLINGS


class Qwen35(Qwen3VL):
    """Any `Qwen3_5ForConditionalGeneration`.

    Example:
        >>> from transformers import Qwen3_5Config
        >>> Qwen35(Qwen3_5Config()).picture_unit
        'patches'
    """

    model_type = "qwen3_5"
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = SIBLINGS
    groups = {  # noqa: RUF012
        "Qwen3_5VisionBlock": "visual",
        "Qwen3_5VisionPatchMerger": "merger",
        "Qwen3_5DecoderLayer": "language",
    }

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision blocks, the one merger, decoder layers."""
        return QwenVL.blocks(self, model)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over patches, merger, decoder with M-RoPE positions `[3, batch, sequence]`."""
        return qwen3_5_graphs.graphs(model)
