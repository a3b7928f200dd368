"""Model families, one file each: where the blocks are, how inputs are prepared, which graphs are exported.

Adding a family is a file with a `ModelFamily` subclass and a line in `FAMILIES` under its `model_type`.
"""

from __future__ import annotations

from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.system.registry import Registry

FAMILIES: Registry[type[ModelFamily]] = Registry(
    "model family",
    {
        "clip_vision_model": "qe_edge.models.clip_vision:ClipVision",
        "dinov2": "qe_edge.models.dinov2:Dinov2",
        "gemma": "qe_edge.models.causal_lm:CausalLM",
        "gemma2": "qe_edge.models.causal_lm:CausalLM",
        "gemma3": "qe_edge.models.gemma3:Gemma3",
        "gemma3_text": "qe_edge.models.causal_lm:CausalLM",
        "gemma4": "qe_edge.models.gemma4:Gemma4",
        "idefics3": "qe_edge.models.idefics3:Idefics3",
        "internvl": "qe_edge.models.internvl:InternVL",
        "lfm2": "qe_edge.models.lfm2:Lfm2",
        "lfm2_vl": "qe_edge.models.lfm2_vl:Lfm2VL",
        "llama": "qe_edge.models.causal_lm:CausalLM",
        "llava_onevision": "qe_edge.models.llava_onevision:LlavaOnevision",
        "minicpmv4_6": "qe_edge.models.minicpmv4_6:MiniCPMV46",
        "mistral": "qe_edge.models.causal_lm:CausalLM",
        "paligemma": "qe_edge.models.paligemma:PaliGemma",
        "phi3": "qe_edge.models.causal_lm:CausalLM",
        "phi4_multimodal": "qe_edge.models.phi4_multimodal:Phi4Multimodal",
        "pi0": "qe_edge.models.pi0:Pi0",
        "qwen2": "qe_edge.models.causal_lm:CausalLM",
        "qwen2_5_vl": "qe_edge.models.qwen2_5_vl:Qwen25VL",
        "qwen2_vl": "qe_edge.models.qwen2_vl:Qwen2VL",
        "qwen3": "qe_edge.models.causal_lm:CausalLM",
        "qwen3_5": "qe_edge.models.qwen3_5:Qwen35",
        "qwen3_5_text": "qe_edge.models.qwen3_5:Qwen35Text",
        "qwen3_vl": "qe_edge.models.qwen3_vl:Qwen3VL",
        "siglip_vision_model": "qe_edge.models.clip_vision:SiglipVision",
        "smolvlm": "qe_edge.models.idefics3:Idefics3",
    },
)

__all__ = ["FAMILIES", "Block", "Encoded", "GraphSpec", "ModelFamily", "Sample"]
