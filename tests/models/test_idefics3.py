"""Idefics3 and SmolVLM: tiles and their tokens as transformers' processor writes them, and every family's checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, SmolVLMProcessor

from qe_edge.demo import model_path
from qe_edge.models.family import Sample
from qe_edge.models.idefics3 import AROUND, OVERVIEW
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel
from tests.models.conversations import ODD, SQUARE, WIDE
from tests.models.families import FamilyChecks
from tests.models.random_models import save_random_model
from tests.models.video_checks import VideoChecks, film, video_cases

SIDE, PATCH = 64, 8
TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% elif c.type == 'video' %}<video>"
    "{% else %}<image>{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def write(folder: Path, model_type: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer.add_special_tokens({"additional_special_tokens": [AROUND, "<image>", OVERVIEW, *places]})
    tokenizer.chat_template = TEMPLATE
    vision: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    text = {
        "model_type": "llama",
        "vocab_size": 576,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    config = AutoConfig.for_model(
        model_type,
        vision_config=vision,
        text_config=text,
        scale_factor=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_random_model(AutoModelForImageTextToText.from_config, config, tokenizer, folder, norms=(0.5, 1.5))
    kind = {"idefics3": Idefics3ImageProcessorPil, "smolvlm": SmolVLMImageProcessorPil}[model_type]
    kind(size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE}).save_pretrained(folder)
    return folder


class TestSmolVLM(VideoChecks, FamilyChecks):
    """transformers' processor takes pictures or videos of one length, not both at once."""

    linears = {"visual": 2 * 6, "merger": 1, "language": 3 * 7}  # noqa: RUF012
    processor_class = SmolVLMProcessor
    video_processor = "smolvlm"
    processor_options = {"image_seq_len": 4}  # noqa: RUF012
    video_template = DEFAULT_CHAT_TEMPLATE
    mixes = False
    video_cases = video_cases(film(5, 84, 64, 2.0), film(5, 117, 90, 3.0), film(5, 150, 60, 0.05))

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "smolvlm", "smolvlm")

    def test_prompts_are_those_of_transformers(self, original: LoadedModel) -> None:
        tokenizer, image_processor = original.processor.tokenizer, original.processor.image_processor
        processor = Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=TEMPLATE)
        for pictures, count in (((SQUARE,), 10), ((WIDE, ODD), 11)):
            encoded = original.family.encode(original.processor, [Sample(pictures, "what is it?")])
            parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "what is it?"}]
            prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
            opened = [open_image(picture) for picture in pictures]
            wanted = processor(text=[prompt], images=[opened], return_tensors="np", add_special_tokens=False)
            assert np.array_equal(encoded.input_ids, wanted["input_ids"])
            assert np.array_equal(encoded.pixels["pixel_values"], wanted["pixel_values"][0])
            assert len(encoded.pixels["pixel_values"]) == count


class TestIdefics3(FamilyChecks):
    linears = {"visual": 2 * 6, "merger": 1, "language": 3 * 7}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "idefics3", "idefics3")
