"""PaliGemma: prompts of which all tokens see each other, as transformers writes them, and every family's checks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from qe_edge.demo import model_path
from qe_edge.models.configuration import load_family
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.samples import Turn
from qe_edge.runtime.folder_prompts import FolderPrompts
from qe_edge.system.errors import InputError, ModelError
from tests.models.conversations import CASES, ODD, SQUARE
from tests.models.families import LARGE_SIZES, FamilyChecks, Made, check_settings, opened, token_errors
from tests.models.random_models import save_random_model

SIDE, PATCH, TOKENS = 32, 8, 16
WINDOW = 559  # what the longest case is as a prompt, so that its answer does not see the first tokens
PIECES = 1152  # that transformers' processor adds to a tokenizer: places and shapes of objects
TEXTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 32},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
}


def write(folder: Path, text_model: str, **changes: Any) -> Path:  # noqa: ANN401 - values of a configuration
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "bos_token": "<bos>"})
    tokenizer.chat_template = None
    text = {
        "model_type": text_model,
        "vocab_size": 528 + PIECES,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        **TEXTS[text_model],
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    image = tokenizer.convert_tokens_to_ids("<image>")
    values = {"projection_dim": 96, **changes}
    config = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=image, **values)
    save_random_model(PaliGemmaForConditionalGeneration, config, tokenizer, folder, norms=(0.1, 0.9))
    processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor.image_seq_length = TOKENS
    processor.save_pretrained(folder)
    return folder


class PaliGemmaChecks(FamilyChecks):
    linears = {"visual": 2 * 6, "merger": 1, "language": 2 * 7}  # noqa: RUF012
    cases = tuple(case for case in CASES if case != "several turns")
    samples = (*CASES["batch"], *CASES["two pictures"])
    test_validation = None  # type: ignore[assignment] # as of Gemma 3, which it would repeat

    @pytest.mark.slow
    def test_graphs_round_activations_alike(self, experts: tuple[LoadedModel, Path]) -> None:
        """Every token of a prompt sees a code that rounds otherwise; prompts without such a code are exact."""
        made = opened(experts[1])
        errors = [token_errors(made, CASES[case]).max() for case in self.cases if case != "long"]
        assert min(errors) < 1e-6
        assert max(errors) < 0.1


class TestPaliGemma2(PaliGemmaChecks):
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "paligemma2", "gemma2")

    def test_prompts_are_those_of_transformers(self, original: LoadedModel) -> None:
        tokenizer = AutoTokenizer.from_pretrained(original.model.name_or_path)
        processor = PaliGemmaProcessor(original.processor.image_processor, tokenizer)
        for sample, text in (
            (Sample(SQUARE, "what is it?", "a circle"), "<image>what is it?"),
            (Sample((SQUARE, ODD), "is this as in ?", "no", marks=(8, 14)), "is this <image>as in <image>?"),
        ):
            encoded = original.family.encode(original.processor, [sample], answers=True)
            opened = [open_image(picture) for picture in sample.pictures]
            wanted = processor(text=[text], images=[opened], suffix=[sample.answer], return_tensors="np")
            assert np.array_equal(encoded.input_ids, wanted["input_ids"])
            assert np.array_equal(encoded.answer_mask, wanted["token_type_ids"] != 0)
            assert np.array_equal(encoded.pixels["pixel_values"], wanted["pixel_values"])

    def test_what_has_no_prompt_is_refused(self, original: LoadedModel) -> None:
        for sample, problem in (
            (Sample(None, "running text", kind=TEXT), "no running text"),
            (Sample(SQUARE, "is there a red shape in the image? " * 70), "graphs of this model take 559"),
            (Sample(SQUARE, "why?", earlier=(Turn("user", "is it?"), Turn("assistant", "no"))), "several turns"),
        ):
            with pytest.raises(InputError, match=problem):
                original.family.encode(original.processor, [sample])

    @pytest.mark.parametrize("changes", [{}, {"resample": 2}, {"do_normalize": False}], ids=str)
    def test_the_picture_graph_of_released_models(
        self, original: LoadedModel, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        """256 tokens of 224 pixels."""
        family = load_family(original.source)
        family.config.vision_config.image_size, family.config.vision_config.patch_size = 224, 14
        image_processor = SiglipImageProcessorPil(size={"height": 224, "width": 224}, **changes)
        processor = replace(original.processor, image_processor=image_processor)
        check_settings(family, processor, tmp_path, LARGE_SIZES)
        nearest = replace(processor, image_processor=SiglipImageProcessorPil(resample=0))
        assert family.picture_graph(nearest) is None

    def test_a_prompt_beyond_the_window_is_refused_without_transformers(self, made: Made) -> None:
        prompts = FolderPrompts(made.onnx, made.engine.manifest)
        with pytest.raises(InputError, match="graphs of this model take 559"):
            prompts.read([Turn("user", "is there a red shape in the image? " * 70)], [])


class TestPaliGemma(PaliGemmaChecks):
    # as of PaliGemma 2, whose decoder alone is another
    test_quant_experts_and_its_checkpoint = None  # type: ignore[assignment]
    test_graphs_round_activations_alike = None  # type: ignore[assignment]
    cases = ("square", "two pictures", "picture last", "batch", "text only", "long")

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "paligemma", "gemma")


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("image_token_index", 9999, "image_token_index 9999 is outside the vocabulary of 1680"),
        ("projection_dim", 64, "projection_dim 64 is not text_config.hidden_size 96"),
    ],
)
def test_settings_that_do_not_fit(key: str, value: int, problem: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "gemma")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_model(str(folder))
