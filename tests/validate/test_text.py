"""Perplexity, divergence and exact answers against slow and obvious computations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import CalibrationError
from qe_edge.validate.answers import answer_all, is_right
from qe_edge.validate.metrics import kl_divergence
from qe_edge.validate.subjects import TorchSubject, in_float32
from qe_edge.validate.text import exact_answers, mean_kl, median_kl, perplexity, predict, text_windows
from tests.small_models import write_small_llama

TEXTS = ["is there a red shape in the image?", "what color is the shape? the shape is teal."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def original(folder: Path) -> LoadedModel:
    return load_model(str(folder), torch.float32)


@pytest.fixture(scope="module")
def quantized(folder: Path) -> LoadedModel:
    samples = [Sample(None, text, kind="text") for text in TEXTS]
    return in_float32(quantize(str(folder), make_recipe(method="rtn", scheme="w3a16"), samples)[0])


def logits_of(loaded: LoadedModel, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(input_ids=torch.tensor([tokens])).logits[0, :-1].double()
    return logits


def test_windows_hold_every_token_once(original: LoadedModel) -> None:
    tokenizer = original.processor.tokenizer
    every = [token for text in TEXTS for token in tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]]
    batches = text_windows(tokenizer, TEXTS, length=7, batch=2)
    found = [token for part in batches for token in part.input_ids[part.attention_mask == 1]]
    assert found == every[: len(found)]
    assert len(every) - len(found) < 2  # a single token predicts nothing
    limited = text_windows(tokenizer, TEXTS, length=7, limit=3)
    assert sum(len(part.input_ids) for part in limited) == 3
    with pytest.raises(CalibrationError, match="no text"):
        text_windows(tokenizer, [])


def test_perplexity_and_divergence(original: LoadedModel, quantized: LoadedModel) -> None:
    batches = text_windows(original.processor.tokenizer, TEXTS, length=7, batch=3)
    windows = [
        ids[mask == 1].tolist()
        for part in batches
        for ids, mask in zip(part.input_ids, part.attention_mask, strict=True)
    ]
    assert len({len(window) for window in windows}) == 2  # the last one is padded
    wanted, found = predict(original, batches, "text"), predict(quantized, batches, "text")
    losses, divergences = [], []
    for window in windows:
        reference, other = logits_of(original, window), logits_of(quantized, window)
        losses.append(-other.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]])
        divergences.append(kl_divergence(reference, other))
    assert perplexity(found) == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-4)
    assert mean_kl(wanted, found) == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-3)
    assert mean_kl(wanted, found) > 1e-4
    assert mean_kl(wanted, wanted) == 0
    rows = [part.mean().item() for part in divergences if len(part)]
    assert median_kl(wanted, found) == pytest.approx(np.median(rows), rel=1e-3)


def test_small_divergences_are_exact(original: LoadedModel) -> None:
    batches = text_windows(original.processor.tokenizer, TEXTS, length=7)
    one, two = predict(original, batches, "text"), predict(original, batches, "text")
    two.hidden.mul_(1 + 1e-4)
    exact = [kl_divergence(wanted, found) for (wanted, _), (found, _) in zip(one.logits(), two.logits(), strict=True)]
    assert 0 < mean_kl(one, two) < 1e-5
    assert mean_kl(one, two) == pytest.approx(torch.cat(exact).mean().item(), rel=0.02)


def test_exact_answers_are_what_generation_gives() -> None:
    """The demo, whose answers are partly right; both ways read pictures and questions."""
    from qe_edge.calibration.sources import load_evaluation

    loaded = load_model("demo", torch.float32)
    samples = load_evaluation("demo")[:24]
    answers = answer_all(TorchSubject(loaded), loaded, samples, 8, lambda _: None)
    wanted = [is_right(answer, sample.answer or "") for answer, sample in zip(answers, samples, strict=True)]
    encoded = [
        loaded.family.encode(loaded.processor, samples[start : start + 7], answers=True) for start in range(0, 24, 7)
    ]
    found = exact_answers(predict(loaded, encoded, "answer"), len(samples))
    assert found.tolist() == wanted
    assert 0 < np.mean(found) < 1


def test_a_sample_without_answer_is_wrong(original: LoadedModel) -> None:
    samples = [Sample(None, "what?"), Sample(None, "what?", "teal")]
    encoded = original.family.encode(original.processor, samples, answers=True)
    predicted = predict(original, [encoded], "answer")
    assert set(predicted.samples.tolist()) == {1}
    assert not exact_answers(predicted, 2)[0]
    alone = original.family.encode(original.processor, samples[:1], answers=True)
    with pytest.raises(CalibrationError, match="no answer"):
        predict(original, [alone], "answer")


def test_pictures_are_counted_out(picture_of: Callable[[int], Image.Image]) -> None:
    """Of a vision-language model's prompt only text is predicted, never the places of image features."""
    loaded = load_model("demo", torch.float32)
    encoded = loaded.family.encode(loaded.processor, [Sample(picture_of(64), "what?", "teal")], answers=True)
    predicted = predict(loaded, [encoded], "text")
    assert len(predicted.targets) < encoded.input_ids.size - int(encoded.image_mask.sum())
    assert loaded.family.config.image_token_id not in predicted.targets.tolist()


@pytest.fixture
def picture_of() -> Callable[[int], Image.Image]:
    return lambda size: Image.new("RGB", (size, size), (200, 30, 30))


def test_reading_predictions_leaves_gradients_on(original: LoadedModel) -> None:
    predicted = predict(original, text_windows(original.processor.tokenizer, TEXTS), "text")
    for (rows, _), _other in zip(predicted.logits(), predicted.logits(), strict=True):
        assert torch.is_grad_enabled()
        assert not rows.requires_grad
    assert torch.is_grad_enabled()
