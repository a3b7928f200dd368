"""InternVL on a tiny model with random weights: structure, tiles, quantizing, checkpoint, export."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLProcessor

from qe_edge.export.exporter import export_model
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import ModelError
from tests.models.conftest import END, START, TOKENS_PER_TILE, write_tiny_internvl
from tests.models.families import FamilyChecks
from tests.models.video_checks import VideoChecks, film, video_cases

QUICK = {"tokens": 128, "em_steps": 1}
LINEARS = {"visual": 2 * 6, "merger": 2, "language": 2 * 7}


def logits_of(loaded: LoadedModel, samples: list[Sample]) -> torch.Tensor:
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, samples, answers=True))
    with torch.no_grad():
        logits: torch.Tensor = loaded.model(**inputs).logits
    return logits


@pytest.mark.parametrize("text_model", ["llama", "qwen2", "qwen3"])
def test_blocks_are_found_whatever_the_text_model(tmp_path: Path, text_model: str) -> None:
    loaded = load_model(str(write_tiny_internvl(tmp_path / text_model, text_model)))
    groups = [block.group for block in loaded.family.blocks(loaded.model)]
    assert groups == ["visual", "visual", "merger", "language", "language"]


@pytest.mark.parametrize(("width", "height", "tiles"), [(56, 56, 1), (200, 190, 5), (112, 56, 3), (56, 200, 5)])
def test_a_picture_becomes_tiles_and_a_thumbnail(
    tiny_internvl: Path, picture: Callable[[int, int], Image.Image], width: int, height: int, tiles: int
) -> None:
    loaded = load_model(str(tiny_internvl))
    encoded = loaded.family.encode(loaded.processor, [Sample(picture(width, height), "what?")])
    assert encoded.pixels["pixel_values"].shape == (tiles, 3, 56, 56)
    assert encoded.image_mask.sum() == tiles * TOKENS_PER_TILE
    text = loaded.processor.tokenizer.decode(encoded.input_ids[0])
    places = np.flatnonzero(encoded.image_mask[0])
    marks = loaded.processor.tokenizer.convert_tokens_to_ids([START, END])
    assert list(encoded.input_ids[0, [places[0] - 1, places[-1] + 1]]) == marks
    assert text.count(START) == text.count(END) == 1


def test_tiles_of_another_size_are_refused(tiny_internvl: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_internvl, folder)
    path = folder / "preprocessor_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "size": {"height": 448, "width": 448}}), encoding="utf-8")
    with pytest.raises(ModelError, match="tiles"):
        load_model(str(folder))
    path.unlink()
    with pytest.raises(ModelError, match="image processor"):
        load_model(str(folder))


@pytest.mark.parametrize(("key", "value"), [("vision_feature_layer", -2), ("vision_feature_select_strategy", "full")])
def test_other_vision_features_are_refused(tiny_internvl: Path, tmp_path: Path, key: str, value: object) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_internvl, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=str(value)):
        load_model(str(folder))


@pytest.mark.parametrize("method", ["rtn", "qe"])
def test_quantize_save_and_reload(tiny_internvl: Path, samples: list[Sample], tmp_path: Path, method: str) -> None:
    original = logits_of(load_model(str(tiny_internvl), torch.float32), samples)
    recipe = make_recipe(method=method, modules=tuple(LINEARS), options=QUICK if method == "qe" else {})
    loaded, recipe = quantize(str(tiny_internvl), recipe, samples * 4)
    assert len(quantized_linears(loaded.model)) == sum(LINEARS.values())
    logits = logits_of(loaded, samples).float()
    assert 0 < (logits - original).square().mean() / original.square().mean() < 0.2
    save_quantized(loaded, recipe, tmp_path / "checkpoint")
    again = logits_of(load_quantized(tmp_path / "checkpoint"), samples)
    assert torch.equal(again.float(), logits)


@pytest.mark.parametrize("module", list(LINEARS))
def test_each_module_alone(tiny_internvl: Path, samples: list[Sample], module: str) -> None:
    loaded, _ = quantize(str(tiny_internvl), make_recipe(method="rtn", modules=(module,)), samples)
    assert len(quantized_linears(loaded.model)) == LINEARS[module]


def export(folder: Path, samples: list[Sample], method: str, scheme: str) -> tuple[LoadedModel, VisionLanguageEngine]:
    """Quantize every module of the model in `folder`, save, reload, export; in PyTorch and in ONNX Runtime."""
    options = QUICK if method == "qe" else {}
    recipe = make_recipe(method=method, scheme=scheme, modules=tuple(LINEARS), options=options)
    quantized, recipe = quantize(str(folder), recipe, samples * 4)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, onnx = Path(scratch) / "checkpoint", Path(scratch) / "onnx"
        save_quantized(quantized, recipe, checkpoint)
        loaded = load_quantized(checkpoint)
        loaded.model.float()
        export_model(checkpoint, onnx)
        return loaded, VisionLanguageEngine.load(onnx, threads=1)


def token_errors(loaded: LoadedModel, engine: VisionLanguageEngine, samples: list[Sample]) -> np.ndarray:
    """Largest error of every valid token's logits, relative to the largest logit."""
    encoded = engine.encode(samples, answers=True)
    expected = logits_of(loaded, samples).numpy()
    valid = encoded.attention_mask.astype(bool)
    errors: np.ndarray = np.abs(engine.logits(encoded) - expected).max(-1)[valid] / np.abs(expected[valid]).max()
    return errors


@pytest.mark.slow
@pytest.mark.parametrize(("method", "scheme"), [("rtn", "w3a16"), ("qe", "w4a16")])
def test_onnx_runtime_equals_pytorch(tiny_internvl: Path, samples: list[Sample], method: str, scheme: str) -> None:
    loaded, engine = export(tiny_internvl, samples, method, scheme)
    assert token_errors(loaded, engine, samples).max() < 1e-4
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, samples))
    tokens = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    answers = tokens[:, inputs["input_ids"].shape[1] :]
    texts = loaded.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    assert engine.generate(samples, max_new_tokens=4) == [text.strip() for text in texts]


@pytest.mark.slow
def test_onnx_runtime_rounds_activations_alike(tiny_internvl: Path, samples: list[Sample]) -> None:
    """Now and then a value lies so near the middle of two codes that the order of summation decides.

    One such value in the vision encoder reaches every later token of its picture, a quarter of all; the rest agree.
    """
    errors = token_errors(*export(tiny_internvl, samples, "qe", "w4a8"), samples)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.05


@pytest.mark.slow
def test_unquantized_export(tiny_internvl: Path, samples: list[Sample], tmp_path: Path) -> None:
    loaded = load_model(str(tiny_internvl), torch.float32)
    export_model(loaded, tmp_path / "onnx")
    assert token_errors(loaded, VisionLanguageEngine.load(tmp_path / "onnx", threads=1), samples).max() < 1e-4


class TestInternVL35(VideoChecks, FamilyChecks):
    """A text model as InternVL 3.5 has it. transformers prepares videos of one length together, and no others."""

    linears = LINEARS
    processor_class = InternVLProcessor
    video_processor = "internvl"
    processor_options = {"image_seq_length": TOKENS_PER_TILE}  # noqa: RUF012
    video_cases = video_cases(film(5, 84, 64, 2.0), film(5, 117, 90, 3.0), film(5, 150, 60, 1.5))

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("model") / "internvl"
        return write_tiny_internvl(folder, "qwen3", head_dim=32, max_position_embeddings=2048)
