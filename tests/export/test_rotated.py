"""What a method does to a model beyond its linear layers reaches the graphs: rotations, a head that is not tied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge.models.family import Sample
from qe_edge.models.quantized import load_quantized
from qe_edge.runtime.engine import VisionLanguageEngine
from tests.conftest import Exports


@pytest.mark.slow
def test_the_graphs_of_a_rotated_model_equal_pytorch(exports: Exports, held_out: list[Sample]) -> None:
    folders = exports("quarot", "w4a16")
    engine = VisionLanguageEngine.load(folders.onnx, threads=1)
    loaded = load_quantized(folders.checkpoint)
    loaded.model.float()
    encoded = loaded.family.encode(loaded.processor, held_out, answers=True)
    with torch.no_grad():
        expected = loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False).logits.numpy()
    valid = encoded.attention_mask.astype(bool)
    difference = engine.logits(encoded)[valid] - expected[valid]
    assert np.linalg.norm(difference) <= 1e-4 * np.linalg.norm(expected[valid])
