"""The real models' interface on small stand-ins in the same folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.real_models import REAL_MODELS, RealModel
from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import TEXT
from qe_edge.models.loading import load_model
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import CalibrationError
from tests.small_models import write_small_dinov2, write_small_llama
from tests.small_vlm import write_small_vlm

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
ARTICLE = "what color is the shape? the shape is teal, and it is no circle. is there a red shape in the image? "


def write_lines(folder: Path, name: str, lines: list[dict[str, str]]) -> None:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def text_folder(folder: Path) -> Path:
    write_small_llama(folder)
    for name in ("calibration", "evaluation", "news"):
        write_lines(folder, name, [{"text": ARTICLE[number:]} for number in range(12)])
    return folder


def question_folder(folder: Path) -> Path:
    write_small_vlm(folder)
    (folder / "data").mkdir()
    lines = []
    for number, sample in enumerate(load_evaluation("demo")[:12]):
        assert isinstance(sample.image, Path)
        (folder / "data" / f"{number}.png").write_bytes(sample.image.read_bytes())
        lines.append(
            {"image": f"{number}.png", "question": sample.question, "answer": str(sample.answer), "kind": sample.kind}
        )
    for name in ("calibration", "evaluation"):
        write_lines(folder, name, lines)
    return folder


def picture_folder(folder: Path) -> Path:
    write_small_dinov2(folder)
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    labels = []
    for number in range(24):
        color, shape = list(COLORS)[number % 2], ("wide", "tall")[number // 2 % 2]
        pixels = np.array(COLORS[color]) + rng.integers(-25, 25, (40, 40, 3))
        pixels[slice(0, 20) if shape == "wide" else slice(0, 40), slice(0, 40) if shape == "wide" else slice(0, 20)] = (
            255
        )
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / f"{number}.png")
        labels += [
            {"image": f"{number}.png", "question": topic, "answer": answer}
            for topic, answer in (("shape", shape), ("color", color))
        ]
    for name in ("calibration", "evaluation"):
        write_lines(folder, name, [{"image": f"{number}.png"} for number in range(24)])
    write_lines(folder, "probe_train", labels[:32])
    write_lines(folder, "probe_test", labels[32:])
    return folder


FOLDERS = {"smollm2": text_folder, "vlm": question_folder, "dinov2": picture_folder}
LOSS = {"smollm2": "kl", "vlm": "kl", "dinov2": "cosine_loss"}
MEASURES = {
    "smollm2": {"kl", "perplexity", "kl_news", "perplexity_news"},
    "vlm": {"kl", "kl_median", "open", "yesno"},
    "dinov2": {"cosine_loss", "cosine_cls", "cosine_patches", "probe", "probe_shape", "probe_color"},
}


@pytest.fixture(scope="module", params=list(REAL_MODELS))
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    folder = FOLDERS[request.param](tmp_path_factory.mktemp(request.param) / "model")
    return REAL_MODELS[request.param](folder, samples=8, questions=12)


def test_the_original_loses_nothing(real: RealModel) -> None:
    measures = real.measure(load_model(real.folder, torch.float32))
    assert measures.keys() == MEASURES[real.name]
    assert measures[LOSS[real.name]] == pytest.approx(0, abs=1e-9)
    assert {name: measures[name] for name in real.original} == pytest.approx(real.original)


def test_fewer_bits_lose_more(real: RealModel) -> None:
    losses = []
    for scheme in ("w4a16", "w3a16"):
        recipe = make_recipe(method="rtn", scheme=scheme, modules=real.modules)
        quantized, _ = quantize(real.folder, recipe, real.calibration)
        losses.append(real.measure(quantized)[LOSS[real.name]])
    assert 0 < losses[0] < losses[1]


def test_calibration_is_drawn_as_asked(real: RealModel) -> None:
    assert len(real.calibration) == 8
    if real.name == "smollm2":
        assert {sample.kind for sample in real.calibration} == {TEXT}


def test_a_folder_without_data_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="assemble_real_models"):
        REAL_MODELS["smollm2"](write_small_llama(tmp_path / "model"))
