"""One way to decode: the rules are transformers' own, and what cannot be obeyed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.runtime.generation import (
    GenerationSettings,
    adjust_logits,
    check_context,
    check_finite,
    make_settings,
    read_settings,
)
from qe_edge.system.errors import InputError, ModelError, NumericalError, QENotice
from qe_edge.validate.subjects import TorchSubject, in_float32
from tests.small_models import CONTEXT, write_small_llama

VOCABULARY = 50
CONFIG = LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None)
TOKENIZER = SimpleNamespace(eos_token_id=7)
RULES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 9, "eos_token_id": list(range(60))},
    {"min_length": 40, "eos_token_id": list(range(60))},
    {"suppress_tokens": list(range(200)), "begin_suppress_tokens": list(range(200, 400))},
    {"repetition_penalty": 0.7, "no_repeat_ngram_size": 3, "begin_suppress_tokens": [3]},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return in_float32(load_model(str(write_small_llama(tmp_path_factory.mktemp("llama") / "model"))))


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules) or "none")
def test_answers_are_those_of_transformers(llama: LoadedModel, rules: dict[str, Any]) -> None:
    given = {"eos_token_id": [2, 33], "pad_token_id": 0, "do_sample": True, "temperature": 0.3, "top_k": 5, **rules}
    llama.model.generation_config = GenerationConfig(**given)
    encoded = llama.family.encode(llama.processor, [Sample(None, "what is the color of it?")])
    ours = TorchSubject(llama).generate_ids(encoded, 20)[0]
    with torch.no_grad():
        theirs = llama.model.generate(  # type: ignore[operator]
            **llama.family.torch_inputs(encoded), max_new_tokens=20, do_sample=False
        )
    ids = theirs[0, encoded.input_ids.shape[1] :].tolist()
    end = next((index for index, token in enumerate(ids) if token in given["eos_token_id"]), len(ids))
    assert ours == ids[:end]
    assert llama.model.generation_config.top_k == 5  # the model's own settings are back


def test_a_batch_decodes_as_its_rows_do(llama: LoadedModel) -> None:
    llama.model.generation_config = GenerationConfig(
        eos_token_id=2, repetition_penalty=1.3, no_repeat_ngram_size=2, min_length=45
    )
    samples = [Sample(None, "a"), Sample(None, "what is the color of the large shape in the middle?")]
    subject = TorchSubject(llama)
    alone = [subject.generate_ids(llama.family.encode(llama.processor, [one]), 12)[0] for one in samples]
    assert subject.generate_ids(llama.family.encode(llama.processor, samples), 12) == alone


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_beams": 3}, "num_beams = 3"),
        ({"stop_strings": ["!"]}, "stop_strings"),
        ({"bad_words_ids": [[4]]}, "bad_words_ids"),
        ({"forced_eos_token_id": 5}, "forced_eos_token_id"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6}, "penalty_alpha"),
        ({"repetition_penalty": -1.0}, "repetition_penalty in generation_config.json is wrong"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"repetition_penalty": 1e-50}, "repetition_penalty in generation_config.json is wrong"),
        ({"min_new_tokens": 2.5}, "min_new_tokens"),
        ({"temperature": -1.0}, "temperature in generation_config.json is wrong"),
        ({"top_p": 1.5}, "top_p"),
        ({"eos_token_id": "</s>"}, "eos_token_id in generation_config.json is wrong"),
        ({"eos_token_id": [1, VOCABULARY]}, f"token {VOCABULARY}; the model's vocabulary has {VOCABULARY}"),
        ({"suppress_tokens": [-1]}, "suppress_tokens"),
    ],
)
def test_settings_that_cannot_be_obeyed(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json|vocabulary") as caught:
        make_settings(values, CONFIG, TOKENIZER)
    assert words in caught.value.problem
    assert "generation_config.json" in caught.value.remedy


def test_how_tokens_are_drawn_is_kept() -> None:
    """What a file leaves out is what transformers' `generate` takes then."""
    plain = make_settings({}, CONFIG, TOKENIZER)
    assert (plain.do_sample, plain.temperature, plain.top_k, plain.top_p, plain.min_p) == (False, 1.0, 50, 1.0, 0.0)
    given = {"do_sample": True, "temperature": 0.01, "top_k": 1, "top_p": 0.001, "min_p": 0.1}
    assert make_settings(given, CONFIG, TOKENIZER).model_dump().items() >= given.items()
    with pytest.warns(QENotice, match="asks for typical_p, which has no effect"):
        make_settings({**given, "typical_p": 0.9, "epsilon_cutoff": 0.0}, CONFIG, TOKENIZER)


def test_end_tokens_are_never_lost() -> None:
    assert make_settings({"eos_token_id": [4, 5]}, CONFIG, TOKENIZER).eos_token_ids == (4, 5, 7)
    from_config = LlamaConfig(vocab_size=VOCABULARY, eos_token_id=[9, 3])
    assert make_settings({}, from_config, TOKENIZER).eos_token_ids == (9, 3, 7)
    assert make_settings({}, CONFIG, TOKENIZER).eos_token_ids == (7,)
    with pytest.raises(ModelError, match="no token that ends an answer"):
        make_settings({}, CONFIG, SimpleNamespace(eos_token_id=None))
    assert make_settings({"pad_token_id": -1}, CONFIG, TOKENIZER).pad_token_id == 7


def test_a_broken_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 2,', encoding="utf-8")
    with pytest.raises(ModelError, match="not valid JSON") as caught:
        read_settings(tmp_path, CONFIG, TOKENIZER)
    assert "original model" in caught.value.remedy
    file.write_text(json.dumps({"eos_token_id": 3}), encoding="utf-8")
    assert read_settings(tmp_path, CONFIG, TOKENIZER).eos_token_ids == (3, 7)


def test_a_model_is_not_loaded_with_a_broken_file(tmp_path: Path) -> None:
    folder = write_small_llama(tmp_path / "model")
    (folder / "generation_config.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ModelError, match="holds no JSON table"):
        load_model(str(folder))


def test_padding_never_counts() -> None:
    rules = GenerationSettings(eos_token_ids=(0,), pad_token_id=0, repetition_penalty=2.0)
    logits = np.ones((1, 4), np.float32)
    adjusted = adjust_logits(rules, logits, np.array([[3, 1]]), np.array([[0, 1]]), 0)
    assert adjusted.tolist() == [[1.0, 0.5, 1.0, 1.0]]
    assert logits.tolist() == [[1.0] * 4]


def test_logits_that_are_not_finite_end_the_answer(llama: LoadedModel) -> None:
    llama.model.generation_config = GenerationConfig(eos_token_id=2)
    encoded = llama.family.encode(llama.processor, [Sample(None, "why?")])
    norm = llama.model.get_parameter("model.norm.weight")
    kept = norm.data.clone()
    norm.data[0] = float("nan")
    try:
        with pytest.raises(NumericalError, match="The logits of the copy are not finite") as caught:
            TorchSubject(llama, name="the copy").generate_ids(encoded, 3)
    finally:
        norm.data = kept
    assert "quantize again" in caught.value.remedy
    with pytest.raises(NumericalError):
        check_finite(np.array([1.0, np.inf]), "The logits")


def test_a_full_context(llama: LoadedModel) -> None:
    encoded = llama.family.encode(llama.processor, [Sample(None, "why?")])
    prompt = encoded.input_ids.shape[1]
    with pytest.raises(
        InputError, match=f"{prompt} tokens and the answer up to {CONTEXT}.*at most {CONTEXT}"
    ) as caught:
        TorchSubject(llama).generate_ids(encoded, CONTEXT)
    assert f"at most {CONTEXT - prompt} tokens" in caught.value.remedy
    check_context(100, 28, 128)
    with pytest.raises(InputError, match="Shorten"):
        check_context(129, 0, 128)
