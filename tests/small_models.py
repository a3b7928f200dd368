"""A language model and a vision encoder with random weights in folders, as small as they can be quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from qe_edge.demo import model_path

PICTURE, PATCH = 56, 14
LAYERS = 2
CONTEXT = 128  # tokens
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_small_llama(folder: Path, **sizes: int) -> Path:
    """Two decoder layers with the demo's tokenizer; `sizes` are those of its configuration that differ."""
    values: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(**{**values, **sizes})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    _spread(model)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_small_dinov2(folder: Path) -> Path:
    """Two layers on pictures of 4 x 4 patches."""
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=PICTURE,
        patch_size=PATCH,
    )
    torch.manual_seed(0)
    model = Dinov2Model(config)
    _spread(model)
    model.save_pretrained(folder)
    BitImageProcessorPil(size={"height": PICTURE, "width": PICTURE}, do_center_crop=False).save_pretrained(folder)
    return folder


def _spread(model: nn.Module) -> None:
    """Weights so large that outputs depend on every layer."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            nn.init.normal_(parameter, std=0.15)
