"""Batches of both families: padding, masks, image tokens, and that a batch changes nobody's answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qe_edge.errors import InputError, ModelError
from qe_edge.models.batching import check_chat_template
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel


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


@pytest.mark.parametrize("with_picture", [True, False])
def test_image_tokens_in_the_question_are_refused(
    loaded: LoadedModel, samples: list[Sample], with_picture: bool
) -> None:
    token = loaded.processor.tokenizer.decode([loaded.family.config.image_token_id])
    sample = Sample(samples[0].image if with_picture else None, f"what is {token}?")
    with pytest.raises(InputError, match="question"):
        loaded.family.encode(loaded.processor, [sample])


def test_image_tokens_in_the_answer_are_refused(loaded: LoadedModel, samples: list[Sample]) -> None:
    token = loaded.processor.tokenizer.decode([loaded.family.config.image_token_id])
    with pytest.raises(InputError, match="answer"):
        loaded.family.encode(loaded.processor, [Sample(samples[0].image, "what?", token)], answers=True)


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
