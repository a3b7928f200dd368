"""Language models without pictures: encoding, quantizing, checkpoint, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.plan import make_plan
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import InputError, ModelError, RecipeError
from qe_edge.validate.subjects import TorchSubject, in_float32
from tests.small_models import CONTEXT, LAYERS, write_small_llama

LINEARS = LAYERS * 7
LONG = Sample(None, "is there a red shape in the image? no, the shape is blue.", kind=TEXT)
SHORT = Sample(None, "what shape?", kind=TEXT)
CHAT = Sample(None, "what color is the shape?", "teal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("llama") / "model")


def logits_of(loaded: LoadedModel, samples: list[Sample]) -> torch.Tensor:
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, samples, answers=True))
    with torch.no_grad():
        logits: torch.Tensor = in_float32(loaded).model(**inputs).logits
    return logits


def test_text_is_tokenized_as_it_is_and_questions_as_chat(folder: Path) -> None:
    loaded = load_model(str(folder))
    encoded = loaded.family.encode(loaded.processor, [SHORT, CHAT], answers=True)
    decode = loaded.processor.tokenizer.decode
    text = encoded.input_ids[0][encoded.attention_mask[0] == 1]
    assert decode(text) == SHORT.question
    assert not encoded.answer_mask[0].any()
    assert not encoded.image_mask.any()
    prompt = decode(encoded.input_ids[1][(encoded.attention_mask[1] == 1) & ~encoded.answer_mask[1]])
    assert prompt == "<|im_start|>user\nwhat color is the shape?<|im_end|>\n<|im_start|>assistant\n"
    answer = encoded.input_ids[1][encoded.answer_mask[1]]
    assert decode(answer[:-1]) == "teal"
    assert answer[-1] == loaded.processor.tokenizer.eos_token_id


def test_a_model_without_chat_template_takes_questions_as_text(folder: Path) -> None:
    loaded = load_model(str(folder))
    loaded.processor.tokenizer.chat_template = None
    encoded = loaded.family.encode(loaded.processor, [CHAT])
    assert loaded.processor.tokenizer.decode(encoded.input_ids[0]) == CHAT.question


def test_padding_changes_nothing(folder: Path) -> None:
    loaded = load_model(str(folder), torch.float32)
    alone, padded = logits_of(loaded, [SHORT]), logits_of(loaded, [SHORT, LONG])
    assert torch.allclose(padded[:1, -alone.shape[1] :], alone, atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "qe"])
def test_quantize_save_and_reload(folder: Path, tmp_path: Path, method: str) -> None:
    samples = [LONG, SHORT, CHAT]
    original = logits_of(load_model(str(folder)), samples)
    options = {"tokens": 128, "em_steps": 1} if method == "qe" else {}
    loaded, recipe = quantize(str(folder), make_recipe(method=method, options=options), samples * 3)
    assert len(quantized_linears(loaded.model)) == LINEARS
    logits = logits_of(loaded, samples)
    assert 0 < (logits - original).square().mean() / original.square().mean() < 0.3
    save_quantized(loaded, recipe, tmp_path / "checkpoint")
    assert torch.equal(logits_of(load_quantized(tmp_path / "checkpoint"), samples), logits)


def test_plan_counts_the_same_layers(folder: Path) -> None:
    plan = make_plan(str(folder), make_recipe(method="rtn"), [LONG])
    assert len(plan.layers) == LINEARS
    assert plan.memory_bytes > plan.checkpoint_bytes


def test_what_it_cannot_read_is_refused(folder: Path) -> None:
    loaded = load_model(str(folder))
    picture = Sample(Image.fromarray(np.zeros((8, 8, 3), np.uint8)), "what?")
    for sample, message in [
        (picture, "no pictures"),
        (Sample(None, "shape " * CONTEXT * 2, kind=TEXT), f"reads {CONTEXT}"),
        (Sample(None, "", kind=TEXT), "empty"),
    ]:
        with pytest.raises(InputError, match=message):
            loaded.family.encode(loaded.processor, [sample])
    with pytest.raises(RecipeError, match=r"no visual module.*--modules language"):
        quantize(loaded, make_recipe(method="rtn", modules=("visual",)), [LONG])


def test_a_folder_without_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelError, match="tokenizer"):
        load_model(str(bare))


@pytest.mark.slow
def test_export_build_and_answer(folder: Path, tmp_path: Path) -> None:
    """The language graph alone, quantized: engine and PyTorch agree on logits and on greedy answers."""
    samples = [LONG, SHORT, CHAT]
    save_quantized(*quantize(str(folder), make_recipe(method="rtn", scheme="w4a16"), samples), tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path / "onnx")
    assert not (tmp_path / "onnx" / "visual.onnx").exists()
    engine = VisionLanguageEngine.load(build_engines(tmp_path / "onnx", tmp_path / "engines", "cpu"), threads=1)
    loaded = load_quantized(tmp_path / "checkpoint")
    wanted = logits_of(loaded, samples).numpy()
    encoded = engine.encode(samples, answers=True)
    valid = encoded.attention_mask.astype(bool)
    assert np.abs(engine.logits(encoded)[valid] - wanted[valid]).max() < 1e-4 * np.abs(wanted[valid]).max()
    tokens = TorchSubject(loaded).generate_ids(loaded.family.encode(loaded.processor, [CHAT, SHORT]), 5)
    texts = loaded.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert engine.generate([CHAT, SHORT], max_new_tokens=5) == [text.strip() for text in texts]
    with pytest.raises(InputError, match="no pictures"):
        engine.generate([Sample(Image.new("RGB", (8, 8)), "what?")])
