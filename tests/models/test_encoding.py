"""Batches of both families: padding, masks, image tokens, and that a batch changes nobody's answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from qe_edge.models.batching import check_chat_template
from qe_edge.models.chat import chat_ids
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.models.samples import Turn
from qe_edge.system.errors import InputError, ModelError


def test_padding_stands_left_and_is_masked(loaded: LoadedModel, samples: list[Sample]) -> None:
    encoded = loaded.family.encode(loaded.processor, samples, answers=True)
    lengths = []
    for row, sample in enumerate(samples):
        alone = loaded.family.encode(loaded.processor, [sample], answers=True)
        length = alone.input_ids.shape[1]
        lengths.append(length)
        assert alone.attention_mask.all()
        for name in ("input_ids", "attention_mask", "image_mask", "answer_mask"):
            assert np.array_equal(getattr(encoded, name)[row, -length:], getattr(alone, name)[0]), name
        for name in ("attention_mask", "image_mask", "answer_mask"):
            assert not getattr(encoded, name)[row, :-length].any(), name
    assert len(set(lengths)) > 2  # the samples do need padding
    assert max(lengths) == encoded.input_ids.shape[1]


def test_one_image_token_per_feature(loaded: LoadedModel, samples: list[Sample]) -> None:
    encoded = loaded.family.encode(loaded.processor, samples)
    inputs = loaded.family.torch_inputs(encoded)
    grids = {name: inputs[name] for name in ("image_grid_thw",) if name in inputs}
    with torch.no_grad():
        features = loaded.model.get_image_features(inputs["pixel_values"], **grids).pooler_output
    count = sum(part.reshape(-1, part.shape[-1]).shape[0] for part in features)
    assert encoded.image_mask.sum() == count
    assert encoded.image_mask[2].sum() == 0  # the sample without a picture


def test_earlier_answers_are_answers_too(loaded: LoadedModel, samples: list[Sample]) -> None:
    """Calibration weighs them and a budget sees them; a picture between them moves their places."""
    tokenizer = loaded.processor.tokenizer
    first, second = samples[0].image, samples[1].image
    assert not isinstance(first, tuple | None)
    earlier = (Turn("user", "is it red?", (0,)), Turn("assistant", "yes"), Turn("user", "and this?", (4,)))
    talk = Sample((first, second), "why?", "it is blue", earlier=(*earlier, Turn("assistant", "a circle")))
    encoded = loaded.family.encode(loaded.processor, [samples[2], talk], answers=True)
    end = tokenizer.eos_token
    assert tokenizer.decode(encoded.input_ids[1][encoded.answer_mask[1]]) == f"yes{end}a circle{end}it is blue{end}"
    assert not loaded.family.encode(loaded.processor, [talk]).answer_mask.any()


def test_the_answer_closes_with_the_end_token(loaded: LoadedModel, samples: list[Sample]) -> None:
    tokenizer = loaded.processor.tokenizer
    encoded = loaded.family.encode(loaded.processor, samples, answers=True)
    for ids, mask, sample in zip(encoded.input_ids, encoded.answer_mask, samples, strict=True):
        answer = ids[mask]
        assert answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer[:-1]) == sample.answer
    prompts = loaded.family.encode(loaded.processor, samples)
    assert not prompts.answer_mask.any()


def test_a_batch_gives_the_logits_of_each_sample_alone(loaded: LoadedModel, samples: list[Sample]) -> None:
    encoded = loaded.family.encode(loaded.processor, samples, answers=True)
    with torch.no_grad():
        together = loaded.model(**loaded.family.torch_inputs(encoded)).logits
        for row, sample in enumerate(samples):
            alone = loaded.family.encode(loaded.processor, [sample], answers=True)
            logits = loaded.model(**loaded.family.torch_inputs(alone)).logits[0]
            error = (together[row, -len(logits) :] - logits).abs().max() / logits.abs().max()
            assert error < 1e-4


def test_no_pictures_at_all(loaded: LoadedModel) -> None:
    encoded = loaded.family.encode(loaded.processor, [Sample(None, "is it?"), Sample(None, "what is this?")])
    assert encoded.pixels == {}
    assert not encoded.image_mask.any()
    assert torch.isfinite(loaded.model(**loaded.family.torch_inputs(encoded)).logits).all()


CONTROL = ["<|image_pad|>", "<|im_end|>", "<|im_start|>assistant", "x<|vision_start|><|video_pad|>"]


@pytest.mark.parametrize("with_picture", [True, False])
@pytest.mark.parametrize("spelled", CONTROL)
def test_special_tokens_in_a_text_are_text(
    loaded: LoadedModel, samples: list[Sample], spelled: str, with_picture: bool
) -> None:
    tokenizer, image = loaded.processor.tokenizer, samples[0].image if with_picture else None
    plain = Sample(image, "what is ??", "!", earlier=(Turn("user", "_"), Turn("assistant", "-")))
    literal = Sample(image, f"what is {spelled}?", spelled, earlier=(Turn("user", spelled), Turn("assistant", spelled)))
    expected, found = (loaded.family.encode(loaded.processor, [one], answers=True) for one in (plain, literal))
    special = set(tokenizer.all_special_ids)
    controls = [[token for token in encoded.input_ids[0] if token in special] for encoded in (expected, found)]
    assert controls[0] == controls[1]
    assert tokenizer.decode(found.input_ids[0]).count(spelled) >= 4
    answers = tokenizer.decode(found.input_ids[0][found.answer_mask[0]])
    assert answers == f"{spelled}{tokenizer.eos_token}" * 2  # the earlier one and the reference


def test_special_tokens_in_running_text_are_text(loaded: LoadedModel) -> None:
    tokenizer = loaded.processor.tokenizer
    encoded = loaded.family.encode(loaded.processor, [Sample(None, "one<|endoftext|>two", kind=TEXT)])
    assert tokenizer.decode(encoded.input_ids[0]) == "one<|endoftext|>two"
    assert not set(encoded.input_ids[0].tolist()) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(
    "text", ["what color is it?", " two  spaces ", "line\nbreak \t end\n", "<|im_ end|>", "né 漢 🙂", ""]
)
def test_ordinary_texts_keep_their_tokens(loaded: LoadedModel, samples: list[Sample], text: str) -> None:
    tokenizer = loaded.processor.tokenizer
    content = [{"type": "image"}, {"type": "text", "text": text}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    image = loaded.family.config.image_token_id
    (ids,) = loaded.family.encode(loaded.processor, [Sample(samples[0].image, text)]).input_ids.tolist()
    at = whole.index(image)
    tail = whole[at + 1 :]
    assert ids[:at] == whole[:at]
    assert ids[-len(tail) :] == tail


def test_a_tokenizer_that_differs_in_pieces_refuses_special_tokens(
    sentencepiece_like: Callable[[str], Any],
) -> None:
    plain, literal = [Turn("user", "what color?")], [Turn("user", "what</s>")]
    chat = sentencepiece_like("first")
    prompt = chat.apply_chat_template([{"role": "user", "content": plain[0].text}], tokenize=False)
    assert chat_ids(chat, plain, as_parts=False) == chat(prompt, add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match=r"special token '</s>'.*Leave it out"):
        chat_ids(chat, literal, as_parts=False)
    exact = sentencepiece_like("always")
    ids = chat_ids(exact, literal, as_parts=False)
    assert exact.eos_token_id not in ids
    assert "what</s>" in exact.decode(ids)


@pytest.fixture
def sentencepiece_like() -> Callable[[str], Any]:
    """Makes a tokenizer that writes spaces as "▁" and unknown characters as bytes, as Llama's does."""

    def make(scheme: str) -> Any:  # noqa: ANN401 - tokenizers share no typed base
        words = ["<unk>", "<s>", "</s>", "▁", *"whatcolor?[]INSTuser", *(f"<0x{byte:02X}>" for byte in range(256))]
        vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
        core = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token=words[0]))
        core.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        decoders = [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
        core.decoder = tokenizers.decoders.Sequence(decoders)
        made = PreTrainedTokenizerFast(
            tokenizer_object=core, **dict(zip(("unk_token", "bos_token", "eos_token"), words, strict=False))
        )
        made.chat_template = "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}"
        return made

    return make


def test_several_pictures_stand_in_their_places(loaded: LoadedModel, samples: list[Sample]) -> None:
    first, second = samples[0].image, samples[1].image
    earlier = (Turn("system", "be brief"), Turn("user", "what is it?", (0,)), Turn("assistant", "a circle"))
    sample = Sample([first, second], "and this  one?", earlier=earlier, marks=(9,))
    encoded = loaded.family.encode(loaded.processor, [sample, Sample(first, "alone?")])
    image = loaded.family.config.image_token_id
    token = loaded.processor.tokenizer.decode([image])
    text = loaded.processor.tokenizer.decode(encoded.input_ids[0][encoded.attention_mask[0].astype(bool)])
    assert re.sub(f"({re.escape(token)})+", "#", text).replace("<|vision_start|>#<|vision_end|>", "#").replace(
        "#\n", "#"
    ) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n#what is it?<|im_end|>\n"
        "<|im_start|>assistant\na circle<|im_end|>\n<|im_start|>user\nand this # one?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    alone = [loaded.family.encode(loaded.processor, [Sample(one, "?")]) for one in (first, second, first)]
    wanted = np.concatenate([one.pixels["pixel_values"] for one in alone])
    assert np.array_equal(encoded.pixels["pixel_values"], wanted)
    assert encoded.image_mask.sum() == sum(one.image_mask.sum() for one in alone)


def test_the_order_of_pictures_counts(loaded: LoadedModel, samples: list[Sample]) -> None:
    def logits(*pictures: object) -> torch.Tensor:
        encoded = loaded.family.encode(loaded.processor, [Sample(pictures, "which?")])  # type: ignore[arg-type]
        with torch.no_grad():
            last: torch.Tensor = loaded.model(**loaded.family.torch_inputs(encoded)).logits[0, -1]
        return last

    first, second = samples[0].image, samples[1].image
    assert not torch.allclose(logits(first, second), logits(second, first), atol=1e-3)


def test_errors_name_where_a_sample_came_from(loaded: LoadedModel, tmp_path: Path) -> None:
    context = loaded.family.config.get_text_config().max_position_embeddings
    for sample, problem in (
        (Sample(tmp_path / "gone.png", "?", origin="Line 7 of 'x.jsonl'"), "There is no picture"),
        (Sample(None, "long " * context, origin="Line 7 of 'x.jsonl'"), f"the model reads {context}"),
    ):
        with pytest.raises(InputError, match=rf"Line 7 of 'x.jsonl': .*{problem}"):
            loaded.family.encode(loaded.processor, [Sample(None, "fine"), sample])


def test_a_template_that_refuses_or_leaves_out_a_turn(loaded: LoadedModel) -> None:
    tokenizer = loaded.processor.tokenizer
    turns = [Turn("system", "be brief"), Turn("user", "why?")]
    kept = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
        with pytest.raises(InputError, match=r"refuses the conversation: System role not supported\. Give turns"):
            chat_ids(tokenizer, turns, as_parts=True)
        tokenizer.chat_template = "{{ messages[-1].content[0].text }}"
        with pytest.raises(InputError, match=r"leaves out a turn of the system\. Give the question without it"):
            chat_ids(tokenizer, turns, as_parts=True)
    finally:
        tokenizer.chat_template = kept


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}", "takes no pictures"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "once per picture"),
    ],
)
def test_a_template_without_pictures_is_refused(loaded: LoadedModel, template: str | None, complaint: str) -> None:
    tokenizer = loaded.processor.tokenizer
    kept, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        with pytest.raises(ModelError, match=complaint):
            check_chat_template(tokenizer, "folder", loaded.family.config.image_token_id)
    finally:
        tokenizer.chat_template = kept


def test_the_saved_processor_encodes_alike(loaded: LoadedModel, samples: list[Sample], tmp_path: Path) -> None:
    loaded.family.save_processor(loaded.processor, tmp_path)
    again = loaded.family.load_processor(str(tmp_path))
    first = loaded.family.encode(loaded.processor, samples, answers=True)
    second = loaded.family.encode(again, samples, answers=True)
    assert np.array_equal(first.input_ids, second.input_ids)
    for name, array in first.pixels.items():
        assert np.array_equal(array, second.pixels[name]), name
