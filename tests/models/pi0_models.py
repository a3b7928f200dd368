"""A pi0 with random weights in a folder, and samples of a robot; the head counts are those of the real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PI0Config, PI0ForConditionalGeneration

from qe_edge.demo import model_path
from qe_edge.models.family import Sample
from qe_edge.models.pi0_processor import PI0ImageProcessorPil
from tests.models.conversations import ODD, SQUARE, TALL, WIDE

SIDE, PATCH, TOKENS = 16, 8, 4
STATE, ACTION, CHUNK, STEPS = 5, 4, 6, 4  # a robot's numbers, and actions of a chunk
WIDTH = 8  # numbers that the model has room for
LAYERS = 2
GEMMA = {"model_type": "gemma", "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 1}
STATISTICS = {
    "state_mean": [0.1 * number for number in range(STATE)],
    "state_std": [0.5 + 0.1 * number for number in range(STATE)],
    "actions_mean": [0.2 * number - 0.1 for number in range(ACTION)],
    "actions_std": [0.3 + 0.2 * number for number in range(ACTION)],
}


def write(folder: Path, **changes: Any) -> Path:  # noqa: ANN401 - values of a configuration
    """The model in bfloat16, its tokenizer, image processor and statistics."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = None
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = {
        **GEMMA,
        "vocab_size": image,  # which the picture's token lies behind, as the real one's does
        "hidden_size": 64,
        "intermediate_size": 96,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "pad_token_id": None,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    vlm = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "projection_dim": 64}
    expert = {**GEMMA, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "max_position_embeddings": 512}
    sizes = {"chunk_size": CHUNK, "max_state_dim": WIDTH, "max_action_dim": WIDTH, "num_inference_steps": STEPS}
    config = PI0Config(vlm_config={**vlm, "image_token_index": image}, dit_config=expert, **{**sizes, **changes})
    torch.manual_seed(0)
    model = PI0ForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            nn.init.normal_(parameter, std=0.12)
        else:
            nn.init.uniform_(parameter, 0.1, 0.9)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = PI0ImageProcessorPil(pad_size=size, size={"max_height": SIDE, "max_width": SIDE})
    processor.image_seq_length = TOKENS
    processor.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(STATISTICS), encoding="utf-8")
    return folder


def state(seed: int) -> list[float]:
    """Numbers of a robot."""
    found: list[float] = np.random.default_rng(seed).normal(size=STATE).tolist()
    return found


def recorded(seed: int) -> list[list[float]]:
    """What it did."""
    found: list[list[float]] = np.random.default_rng(seed).normal(size=(CHUNK, ACTION)).tolist()
    return found


CASES: dict[str, list[Sample]] = {
    "one camera": [Sample(SQUARE, "pick the red shape", state=state(0))],
    "odd sizes": [Sample(ODD, "pick it", state=state(1))],
    "panorama": [Sample(WIDE, "turn left", state=state(2))],
    "two cameras": [Sample((SQUARE, TALL), "put the circle on the square", state=state(3))],
    "three cameras": [Sample((ODD, SQUARE, WIDE), "open the box", state=state(4))],
    "batch": [
        Sample((SQUARE, ODD), "stop", state=state(5)),
        Sample(TALL, "what is the color of the shape in these images? pick a teal one", state=state(6)),
        Sample((WIDE, TALL, ODD), "go", state=state(7)),
    ],
    "long": [Sample(SQUARE, "put the red shape on the blue shape " * 12, state=state(8))],
    "far state": [Sample(SQUARE, "go home", state=[1000.0, -1000.0, 0.0, 40.0, -3e4])],
    "no task": [Sample(SQUARE, "", state=state(9))],
}
CALIBRATION = [
    Sample((SQUARE, TALL), "pick the red shape", state=state(20), actions=recorded(20)),
    Sample(ODD, "open the box", state=state(21), actions=recorded(21)),
]
TASK = Sample(SQUARE, "pick it", state=state(0))
LINEARS = {"language": LAYERS * 7, "visual": 6, "merger": 1, "action": LAYERS * 7}
