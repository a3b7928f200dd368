"""LFM2-VL: images and tokens as transformers' processor makes them, stretched positions, and every family's checks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from qe_edge.demo import model_path
from qe_edge.models.lfm2_vl import END, OVERVIEW, START, Lfm2VL, stretched
from qe_edge.models.lfm2_vl_processor import Lfm2VlImageProcessorPil
from qe_edge.models.loading import LoadedModel
from qe_edge.models.processors import VisionLanguageProcessor
from tests.models.conversations import CASES, noise
from tests.models.families import LARGE_SIZES, FamilyChecks, Made, check_device_engines, check_settings
from tests.models.random_models import save_random_model
from tests.models.real_processors import torch_alone

PATCH = 8
SETTINGS: dict[str, Any] = {
    "encoder_patch_size": PATCH,
    "tile_size": 48,
    "max_tiles": 6,
    "min_image_tokens": 4,
    "max_image_tokens": 24,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}<image>{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_of(most: int) -> Any:  # noqa: ANN401 - tokenizers share no typed base
    """The demo's, with the names of `most` x `most` tiles."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    places = [f"<|img_row_{row}_col_{column}|>" for row in range(1, most + 1) for column in range(1, most + 1)]
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END, OVERVIEW, "<image>", *places]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(folder: Path) -> Path:
    tokenizer = tokenizer_of(6)
    config = AutoConfig.for_model(
        "lfm2_vl",
        vision_config={
            "model_type": "siglip2_vision_model",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "patch_size": PATCH,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "lfm2",
            "vocab_size": 576,
            "hidden_size": 96,
            "intermediate_size": 160,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention", "conv"],
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
        },
        projector_hidden_size=80,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    save_random_model(AutoModelForImageTextToText.from_config, config, tokenizer, folder, norms=(0.5, 1.5))
    Lfm2VlImageProcessorPil(**SETTINGS).save_pretrained(folder)
    return folder


class TestLfm2VL(FamilyChecks):
    linears = {"visual": 2 * 6, "merger": 2, "language": 2 * 5 + 7}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "lfm2_vl")

    def test_engines_for_gpus_answer_alike(self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # the others have images of more patches than a real model's processor makes for its positions
        check_device_engines(made, tmp_path, monkeypatch, ("square", "two pictures", "text only"))

    def test_the_projector_is_called_once_and_computes_what_it_did(self, folder: Path, original: LoadedModel) -> None:
        plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        inputs = original.family.torch_inputs(original.family.encode(original.processor, CASES["several turns"]))
        calls: list[int] = []
        projector = original.model.model.multi_modal_projector  # type: ignore[union-attr] # transformers' own class
        handle = projector.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            logits, wanted = (model(**inputs).logits for model in (original.model, plain))
        handle.remove()
        assert len(calls) == 1
        assert (logits - wanted).abs().max() < 1e-6 * wanted.abs().max()


@pytest.mark.parametrize(
    "changes", [{}, {"use_thumbnail": False}, {"do_image_splitting": False}, {"max_tiles": 10}], ids=str
)
def test_images_are_those_of_transformers(changes: dict[str, int]) -> None:
    """Its own processor has torchvision's functions, which are torch's. With 10 tiles two grids have one shape."""
    with torch_alone():
        module = importlib.import_module("transformers.models.lfm2_vl.image_processing_lfm2_vl")
        theirs = module.Lfm2VlImageProcessor(**{**SETTINGS, **changes}, return_row_col_info=True)
        ours = Lfm2VlImageProcessorPil(**{**SETTINGS, **changes})
        for width, height in [
            (64, 64),
            (300, 60),
            (56, 168),
            (117, 203),
            (9, 5),
            (1, 200),
            (96, 96),
            (240, 161),
            (96, 192),
        ]:
            wanted = theirs(images=[noise(width, height)], return_tensors="np")
            found = ours(images=[noise(width, height)])
            mask = wanted["pixel_attention_mask"].astype(bool)
            assert np.array_equal(found["pixel_values"], wanted["pixel_values"][mask]), (width, height)
            assert np.array_equal(found["grids"], wanted["spatial_shapes"])
            assert found["tiles"].tolist() == [[wanted["image_rows"][0], wanted["image_cols"][0]]]
    sys.modules.pop("transformers.models.lfm2_vl.image_processing_lfm2_vl")


@pytest.mark.parametrize(
    "changes",
    [{"use_thumbnail": False}, {"do_image_splitting": False}, {"max_tiles": 4, "min_tiles": 1}, {"resample": 3}],
    ids=str,
)
def test_the_picture_graph_of_other_settings(changes: dict[str, int], tmp_path: Path) -> None:
    settings = {**SETTINGS, **changes}
    processor = VisionLanguageProcessor(tokenizer_of(6), Lfm2VlImageProcessorPil(**settings))
    check_settings(family_of(processor, num_patches=16), processor, tmp_path)


def test_the_picture_graph_of_released_models(tmp_path: Path) -> None:
    processor = VisionLanguageProcessor(tokenizer_of(10), Lfm2VlImageProcessorPil())
    check_settings(family_of(processor, num_patches=256), processor, tmp_path, LARGE_SIZES)


def family_of(processor: VisionLanguageProcessor, num_patches: int) -> Lfm2VL:
    config = AutoConfig.for_model("lfm2_vl", vision_config={"num_patches": num_patches})
    config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    return Lfm2VL(config)


@pytest.mark.parametrize("sizes", [(16, 22), (7, 16), (1, 32), (3, 13)], ids=str)
@pytest.mark.parametrize("side", [4, 16])
def test_positions_are_stretched_as_torch_does(sizes: tuple[int, int], side: int) -> None:
    learnt = torch.linspace(-2, 2, 3 * side**2).cos().reshape(1, 3, side, side)
    wanted = interpolate(learnt, sizes, mode="bilinear", antialias=True, align_corners=False)[0]
    rows, columns = (stretched(size, side) for size in sizes)
    found = np.einsum("ri,cj,dij->drc", rows, columns, learnt[0].numpy())
    assert np.allclose(found, wanted, atol=5e-6)
