"""The cut demo model, quantized by rounding, and a few held-out questions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.validate.subjects import in_float32
from tests.small_vlm import write_small_vlm

ALL = ("language", "visual", "merger")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_vlm(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def checkpoint(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quant Experts on few samples: has every tensor that there is, and siblings that share some."""
    folder = tmp_path_factory.mktemp("quantized") / "checkpoint"
    options = {"tokens": 128, "em_steps": 1}
    recipe = make_recipe(modules=ALL, options=options, calibration={"source": "demo", "samples": 4})
    save_quantized(*quantize(str(small), recipe), folder)
    return folder


@pytest.fixture
def original(small: Path) -> LoadedModel:
    return load_model(str(small), torch.float32)


@pytest.fixture
def quantized(checkpoint: Path) -> LoadedModel:
    return in_float32(load_quantized(checkpoint))


@pytest.fixture(scope="session")
def questions() -> list[Sample]:
    """Questions of different lengths, so that batches are padded."""
    samples = sorted(load_evaluation("demo"), key=lambda sample: len(sample.question))
    return [samples[0], samples[100], samples[199], *samples[50:55]]
