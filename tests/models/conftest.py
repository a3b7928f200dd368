"""A tiny InternVL with random weights in a folder, and samples of every kind for both families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from qe_edge.demo import model_path
from qe_edge.models.configuration import load_family
from qe_edge.models.family import ModelFamily, Sample
from qe_edge.models.loading import LoadedModel, load_model
from tests.models.model_files import copy_files

TILE, PATCH = 56, 14
TOKENS_PER_TILE = 4
IMAGE_TOKEN, START, END = "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"
# as OpenGVLab's: the template writes the bare image token, the processor puts it between marks
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}<|image_pad|>\n"
    "{% elif c.type == 'video' %}<|video_pad|>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def write_tiny_internvl(folder: Path, text_model: str, **sizes: int) -> Path:
    """A model of about 150 thousand parameters whose outputs depend on every one of them."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(
        model_path(),
        extra_special_tokens={
            "start_image_token": START,
            "end_image_token": END,
            "context_image_token": IMAGE_TOKEN,
            "video_token": "<|video_pad|>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    vision = InternVLVisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=[TILE, TILE],
        patch_size=[PATCH, PATCH],
        attention_bias=True,
        use_mean_pooling=False,
    )
    config = InternVLConfig(
        vision_config=vision.to_dict(),
        text_config={"model_type": text_model, **TEXT, **sizes},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
    )
    model = InternVLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": TILE, "width": TILE}
    GotOcr2ImageProcessorPil(size=size, max_patches=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_internvl(tmp_path_factory.mktemp("internvl") / "llama", "llama")


@pytest.fixture(scope="session", params=["qwen2_vl", "internvl"])
def loaded(request: pytest.FixtureRequest, tiny_internvl: Path) -> LoadedModel:
    """One model of each family, in float32."""
    return load_model("demo" if request.param == "qwen2_vl" else str(tiny_internvl), torch.float32)


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int], Image.Image]:
    """Makes a picture of noise, always the same for a size."""

    def make(width: int, height: int) -> Image.Image:
        pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
        return Image.fromarray(pixels)

    return make


@pytest.fixture(scope="session")
def samples(picture: Callable[[int, int], Image.Image]) -> list[Sample]:
    """Square, wide and tall pictures, one sample without a picture, questions of different lengths."""
    return [
        Sample(picture(64, 64), "what shape is in the image?", "circle"),
        Sample(picture(120, 60), "is there a red shape?", "yes"),
        Sample(None, "is it?", "no"),
        Sample(picture(56, 168), "what is the color of the shape in this very image?", "teal"),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo model's small files, to be damaged."""
    return copy_files(model_path(), tmp_path / "model")


@pytest.fixture(scope="session")
def family() -> ModelFamily:
    """The demo model's family."""
    return load_family(str(model_path()))
