"""What a row of the accuracy benchmark counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy_per_byte import RealModel, measure
from qe_edge.models.family import Sample
from qe_edge.recipes.recipe import make_recipe
from tests.small_models import write_small_llama


@pytest.mark.parametrize("tied", [True, False])
def test_bits_hold_the_matrix_of_a_rotated_model_whose_head_is_the_embedding(tied: bool, tmp_path: Path) -> None:
    folder = str(write_small_llama(tmp_path / "model", tie_word_embeddings=tied))
    samples = [Sample(None, "some text to calibrate on", kind="text")]
    real = RealModel("smollm2", folder, ("language",), samples, {}, lambda _: {"kl": 0.0})
    options = {"rounding": "nearest", "clip": False}
    plain, rotated = (
        measure(real, make_recipe(method=method, options=keys), method, tmp_path / "offers")
        for method, keys in (("rtn", {}), ("quarot", options))
    )
    weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert rotated.stored - plain.stored == pytest.approx(16 * 64 * 64 / weights if tied else 0)
    assert plain.stored == plain.read < 5  # nothing but codes and scales
    assert rotated.read == rotated.stored
