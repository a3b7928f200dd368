"""A MiniCPM-V 4.6 with random weights in a folder; heads, learnt positions and patches are those of the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from qe_edge.demo import model_path
from tests.models.random_models import save_random_model

PATCH = 14
SETTINGS: dict[str, Any] = {"patch_size": PATCH, "scale_resolution": 112, "max_slice_nums": 6}
MARKS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if not loop.first %}\n{% endif %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<|{{ c.type }}_pad|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def write(folder: Path, **changes: Any) -> Path:  # noqa: ANN401 - values of a configuration
    """The model, its tokenizer and its image processor; `changes` are those of its configuration."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(), extra_special_tokens=MARKS)
    tokenizer.chat_template = TEMPLATE
    config = AutoConfig.for_model(
        "minicpmv4_6",
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 16,
            "patch_size": PATCH,
            "image_size": 980,
        },
        text_config={
            "model_type": "qwen3_5_text",
            "vocab_size": 576,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "layer_types": ["linear_attention", "full_attention"],
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 24,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
            "tie_word_embeddings": True,
            **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id),
        },
        insert_layer_id=0,
        tie_word_embeddings=True,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        **changes,
    )
    save_random_model(AutoModelForImageTextToText.from_config, config, tokenizer, folder, norms=(0.1, 0.9))
    mode = config.downsample_mode
    MiniCPMV4_6ImageProcessorPil(**SETTINGS, downsample_mode=mode).save_pretrained(folder)
    return folder
