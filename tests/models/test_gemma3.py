"""Gemma 3 with pictures: marks and masks of pictures are those of transformers; the checks of every family."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from qe_edge.demo import model_path
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.system.errors import ModelError
from tests.models.conversations import CASES
from tests.models.families import FamilyChecks
from tests.models.random_models import save_random_model

SIDE, PATCH, TOKENS = 64, 8, 16
START, IMAGE, STOP = "<start_of_image>", "<image_soft_token>", "<end_of_image>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<start_of_image>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path, **changes: object) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": [START, IMAGE, STOP]})
    tokenizer.chat_template = TEMPLATE
    start, image, stop = (tokenizer.convert_tokens_to_ids(token) for token in (START, IMAGE, STOP))
    text = {
        "vocab_size": 528,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 2048,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 10,  # less than a picture's tokens
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    vision = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        boi_token_index=start,
        eoi_token_index=stop,
        image_token_index=image,
        mm_tokens_per_image=TOKENS,
        **changes,
    )
    save_random_model(Gemma3ForConditionalGeneration, config, tokenizer, folder, norms=(0.1, 0.9))
    Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


class TestGemma3(FamilyChecks):
    linears = {"visual": 2 * 6, "language": 3 * 7}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "gemma3")

    def test_prompts_are_those_of_transformers(self, original: LoadedModel) -> None:
        """The combined class asks its tokenizer for names that only Gemma's has; what it writes is in one attribute."""
        from transformers.models.gemma3.processing_gemma3 import Gemma3Processor

        names = SimpleNamespace(boi_token=START, boi_token_id=0, image_token=IMAGE, image_token_id=0, eoi_token=STOP)
        written = Gemma3Processor.__new__(Gemma3Processor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.processing_utils.ProcessorMixin.__init__", lambda *_, **__: None)
            Gemma3Processor.__init__(written, None, names, image_seq_length=TOKENS)  # type: ignore[arg-type]
        encoded = original.family.encode(original.processor, CASES["several turns"])
        tokenizer = original.processor.tokenizer
        turns = [
            {"role": turn.role, "content": [{"type": "text", "text": turn.text}]}
            for turn in CASES["several turns"][0].conversation
        ]
        turns[0]["content"] = [
            {"type": "image"}, {"type": "text", "text": "is there a"}, {"type": "image"},
            {"type": "text", "text": " red shape?"},
        ]  # fmt: skip
        turns[2]["content"].insert(0, {"type": "image"})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt = prompt.replace(START, written.full_image_sequence)
        assert encoded.input_ids[0].tolist() == tokenizer(prompt, add_special_tokens=False)["input_ids"]

    def test_pictures_are_numbered_in_the_mask(self, original: LoadedModel) -> None:
        encoded = original.family.encode(original.processor, CASES["batch"])
        mask = original.family.graph_mask(encoded)
        assert np.array_equal(mask != 0, encoded.attention_mask != 0)
        assert [sorted(set(row[image].tolist())) for row, image in zip(mask, encoded.image_mask, strict=True)] == [
            [2], [], [2, 3],
        ]  # fmt: skip


@pytest.mark.parametrize(("tokens", "problem"), [(15, "no square number"), (9, "no multiple of tokens per side 3")])
def test_sizes_that_do_not_fit(tokens: int, problem: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8").replace('"mm_tokens_per_image": 16', f'"mm_tokens_per_image": {tokens}')
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_model(str(folder))
