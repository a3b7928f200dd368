"""Small Qwen-VL models with random weights: real widths of vision heads, grouped queries, merged patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qe_edge.demo import model_path
from tests.models.random_models import save_random_model

TEXT = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": True,
}
VISION = {"depth": 4, "hidden_size": 160, "num_heads": 2, "intermediate_size": 192, "out_hidden_size": 96}
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "{% elif c['type']=='video' %}<|vision_start|><|video_pad|><|vision_end|>"
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "vision_config": {
            "depth": 4,
            "embed_dim": 160,
            "num_heads": 2,
            "mlp_ratio": 2,
            "hidden_size": 96,
            "patch_size": 14,
        },
    },
    "qwen2_5_vl": {
        "vision_config": {**VISION, "patch_size": 14, "fullatt_block_indexes": [1, 3], "window_size": 112},
    },
    "qwen3_5": {
        "text": {
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 24,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [2, 1, 1],
                "partial_rotary_factor": 0.25,
            },
        },
        "vision_config": {**VISION, "patch_size": 16, "num_position_embeddings": 64},
    },
    "qwen3_vl": {
        "vision_config": {
            **VISION,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2],
        },
    },
}


def write_qwen(folder: Path, model_type: str, **changes: object) -> Path:
    """A model whose outputs depend on every weight, with the demo's tokenizer and template."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = tokenizer.chat_template.replace(PICTURE, PICTURE + VIDEO)
    marks = {
        "image_token_id": "<|image_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "video_token_id": "<|video_pad|>",
    }
    config = AutoConfig.for_model(
        model_type,
        text_config={
            **TEXT,
            **CONFIGS[model_type].get("text", {}),
            **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
        },
        tie_word_embeddings=True,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in marks.items()},
        **{**{key: values for key, values in CONFIGS[model_type].items() if key != "text"}, **changes},
    )
    norms = (0.1, 0.9) if model_type == "qwen3_5" else (0.5, 1.5)  # whose norms multiply by one plus their weights
    save_random_model(AutoModelForImageTextToText.from_config, config, tokenizer, folder, norms)
    vision = config.vision_config
    Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 28 * 28, "longest_edge": 400 * 400},
    ).save_pretrained(folder)
    return folder
