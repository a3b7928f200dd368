"""Situations of public bug reports of other tools, tried on a real small model: right, refused, or said."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qe_edge.calibration.sources import load_evaluation
from qe_edge.export.exporter import export_model
from qe_edge.models.family import Sample
from qe_edge.models.loading import load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import CalibrationError, QENotice
from qe_edge.validate.subjects import TorchSubject, in_float32
from tests.cli.conftest import cli  # noqa: F401 - a fixture
from tests.cli.running import Run
from tests.conftest import Exported
from tests.small_models import write_small_llama
from tests.small_vlm import write_small_vlm

QUESTIONS = [Sample(sample.image, sample.question) for sample in load_evaluation("demo")[:3]]
TEXT = [Sample(None, "is it a red circle?", "no")]


def rtn(**values: Any) -> Recipe:  # noqa: ANN401 - values of a recipe
    return make_recipe(**{"method": "rtn", "calibration": {"samples": 1}, **values})


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def answers_agree(model: Path, samples: list[Sample], calibration: list[Sample] | None = None) -> bool:
    """PyTorch and engine give the same logits and the same answers."""
    checkpoint, onnx = model.with_name("checkpoint"), model.with_name("onnx")
    save_quantized(*quantize(str(model), rtn(scheme="w4a16"), calibration), checkpoint)
    export_model(checkpoint, onnx)
    loaded = in_float32(load_quantized(checkpoint))
    original, engine = TorchSubject(loaded), VisionLanguageEngine.load(onnx, threads=1)
    encoded, read = loaded.family.encode(loaded.processor, samples), engine.encode(samples)
    apart = np.abs(original.logits(encoded)[:, -1] - engine.logits(read)[:, -1]).max()
    return bool(apart < 1e-4) and original.generate_ids(encoded, 4) == engine.generate_ids(read, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "change"),
    [
        # llm-compressor, transformers: settings of sampling without sampling could not be saved after hours of work
        ("generation_config.json", lambda values: values.update(do_sample=False, temperature=0.7, top_p=0.9)),
        # training leaves use_cache off; optimum exported graphs without a cache
        ("config.json", lambda values: (values.update(use_cache=False), values["text_config"].update(use_cache=False))),
        # llama.cpp's mtmd: the processor's own flags were not obeyed
        ("preprocessor_config.json", lambda values: values.update(do_normalize=False, resample=0)),
        # AutoAWQ: a batch was padded on the side that the tokenizer names
        ("tokenizer_config.json", lambda values: values.update(padding_side="right", model_max_length=16)),
    ],
)
def test_settings_that_training_leaves(tmp_path: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    model = write_small_vlm(tmp_path / "model")
    edit(model / file, change)
    assert answers_agree(model, [*QUESTIONS, Sample(None, "is it?")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 32}, {"hidden_act": "relu"},
        {"tie_word_embeddings": False}, {"num_key_value_heads": 1}, {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        {"hidden_size": 72, "num_attention_heads": 4, "intermediate_size": 100},
    ],
    ids=lambda sizes: next(iter(sizes)),
)  # fmt: skip
def test_kinds_of_decoders(tmp_path: Path, sizes: dict[str, Any]) -> None:
    """onnxruntime-genai, TensorRT-LLM: biases, head sizes and activations that a converter did not look at."""
    model = write_small_llama(tmp_path / "model", **sizes)
    assert answers_agree(model, [Sample(None, "what color is the shape?"), Sample(None, "is it?")], TEXT)


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "<|endoftext|>",
            }
        },
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_tokenizer_that_cuts_off_or_pads(tmp_path: Path, change: dict[str, Any]) -> None:
    """Tokenizers keep what training asked for, and long prompts lost their end without a word."""
    model = write_small_vlm(tmp_path / "model")
    question = [Sample(QUESTIONS[0].image, "what is in it? " * 20)]
    before = encode(model, question)
    edit(model / "tokenizer.json", lambda values: values.update(change))
    assert encode(model, question).tolist() == before.tolist()


def encode(model: Path, samples: list[Sample]) -> np.ndarray:
    loaded = load_model(str(model))
    return loaded.family.encode(loaded.processor, samples).input_ids


def test_a_first_token_stands_once(tmp_path: Path) -> None:
    """llama.cpp, llm-compressor: the template and the tokenizer both add it."""
    model, first = write_small_llama(tmp_path / "model"), "<|im_start|>"
    number = load_model(str(model)).processor.tokenizer.convert_tokens_to_ids(first)
    token = {"SpecialToken": {"id": first, "type_id": 0}}
    processor = {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {first: {"id": first, "ids": [number], "tokens": [first]}},
    }
    edit(model / "tokenizer.json", lambda values: values.update(post_processor=processor))
    edit(model / "tokenizer_config.json", lambda values: values.update(bos_token=first))
    (row,) = encode(model, [Sample(None, "what is it?")]).tolist()
    assert row[0] == number
    assert row[1] != number


@pytest.mark.slow
def test_unlike_questions_in_a_batch_and_one_after_another(exported: Exported) -> None:
    """TensorRT-LLM: batches of more than one, and what an earlier request left behind."""
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    samples = [QUESTIONS[0], Sample(None, "is it?"), Sample(QUESTIONS[2].image, f"{QUESTIONS[2].question} " * 4)]
    together = engine.generate_ids(engine.encode(samples), 6)
    for _ in range(2):
        assert [engine.generate_ids(engine.encode([sample]), 6)[0] for sample in samples] == together


@pytest.mark.slow
def test_the_order_of_pictures_counts(exported: Exported) -> None:
    """llama.cpp's mtmd: pictures that were taken for one another."""
    loaded = in_float32(load_quantized(exported.checkpoint))
    original, engine = TorchSubject(loaded), VisionLanguageEngine.load(exported.onnx, threads=1)
    first, second = (sample.image for sample in QUESTIONS[:2])
    found = []
    for pictures in ([first, second], [second, first], [first, first]):
        sample = [Sample(pictures, "what color is the first?")]
        found.append(engine.logits(engine.encode(sample)))
        assert (
            np.abs(found[-1] - original.logits(loaded.family.encode(loaded.processor, sample))).max() < 0.05
        )  # activations of 8 bits
    assert np.abs(found[0] - found[1]).max() > 1
    assert np.abs(found[0] - found[2]).max() > 1


@pytest.mark.parametrize("method", ["gptq", "qe"])
def test_calibration_data_that_is_always_the_same(small: str, method: str) -> None:
    """GPTQ's and AutoAWQ's matrices that cannot be inverted: the same black picture again and again."""
    samples = [Sample(Image.new("RGB", (112, 112)), "a", "b")] * 3
    options = {"tokens": 128, "em_steps": 0, "experts": 2} if method == "qe" else {}
    loaded, _ = quantize(small, rtn(method=method, options=options), samples)
    assert all(bool(tensor.isfinite().all()) for tensor in loaded.model.state_dict().values())


def test_a_model_that_sees_calibrated_with_text_alone_is_said(small: str, tmp_path: Path) -> None:
    """TensorRT-LLM 1860: a vision-language model that news articles had calibrated saw nothing right any more."""
    with pytest.warns(QENotice, match="No calibration sample has a picture, and the model sees"):
        quantize(small, rtn(), TEXT)
    llama = write_small_llama(tmp_path / "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error", QENotice)
        quantize(str(llama), rtn(), TEXT)  # a language model reads nothing but text


def test_a_template_that_reads_the_clock_is_said(tmp_path: Path) -> None:
    """Llama 3.2's template: prompts of another day, and results that nobody can repeat."""
    model = write_small_llama(tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.warns(QENotice, match="the date into prompts"):
        quantize(str(model), rtn(), TEXT)


@pytest.mark.parametrize("given", [{"samples": 4}, ["text"], [{"text": "x"}], 5, [None], [TEXT]])
def test_what_is_passed_as_samples_and_is_none(small: str, given: Any) -> None:  # noqa: ANN401
    with pytest.raises(CalibrationError, match="passed as a calibration sample"):
        quantize(small, rtn(), given)


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_folders_that_are_links_and_names_of_every_kind(cli: Run, tmp_path: Path) -> None:  # noqa: F811
    """onnxruntime-genai, optimum: blanks, other alphabets, and a data folder that is a link to a larger disk."""
    (tmp_path / "large disk").mkdir()
    place = tmp_path / "data ü 模型 #1 %s 'q' $x"
    place.symlink_to(tmp_path / "large disk")
    model = write_small_vlm(place / "mein Modell")
    words = ["--method", "rtn", "--modules", "merger", "--samples", "1", "--limit", "1"]
    for line in (
        ("deploy", model, "-o", place / "aus", *words),
        ("run", place / "aus", "--prompt", "what is it?", "--max-tokens", 2),
        ("report", place / "aus", "-o", place / "page.html"),
        ("export", place / "aus" / "checkpoint", "-o", place / "new" / "er"),
        ("run", place / "new" / "er", "--prompt", "what is it?", "--max-tokens", 2),
    ):
        outcome = cli(*line)
        assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in place.iterdir()) == ["aus", "mein Modell", "new", "page.html"]
