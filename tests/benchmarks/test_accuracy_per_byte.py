"""What a row of the accuracy benchmark counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.accuracy_per_byte import RealModel, Row, begin, jobs, measure, print_variants, variant_of
from qe_edge.budget.model import AdapterSize, Candidate, Choice, Offer, offers_from_json, offers_to_json
from qe_edge.methods.qe import QuantExperts
from qe_edge.models.family import Sample
from qe_edge.numerics.grids import WeightGrid
from qe_edge.recipes.recipe import make_recipe
from tests.small_models import write_small_llama


@pytest.mark.parametrize("tied", [True, False])
def test_bits_hold_the_matrix_of_a_rotated_model_whose_head_is_the_embedding(tied: bool, tmp_path: Path) -> None:
    folder = str(write_small_llama(tmp_path / "model", tie_word_embeddings=tied))
    samples = [Sample(None, "some text to calibrate on", kind="text")]
    real = RealModel("smollm2", folder, ("language",), samples, {}, lambda _: ({"kl": 0.0}, [0.0]))
    options = {"rounding": "nearest", "clip": False}
    plain, rotated = (
        measure(real, make_recipe(method=method, options=keys), method, tmp_path / "offers")
        for method, keys in (("rtn", {}), ("quarot", options))
    )
    weights = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    assert rotated.stored - plain.stored == pytest.approx(16 * 64 * 64 / weights if tied else 0)
    assert plain.stored == plain.read < 5  # nothing but codes and scales
    assert rotated.read == rotated.stored


def test_what_a_budget_measures_serves_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(write_small_llama(tmp_path / "model"))
    samples = [Sample(None, "some text to calibrate on", kind="text")]
    real = RealModel("smollm2", folder, ("language",), samples, {}, lambda _: ({"kl": 0.0}, [0.0]))
    rows = []
    for bits, name in ((5.5, "ours, 5.5 stored"), (6.0, "ours, 6 stored")):
        recipe = make_recipe(method="qe", budget={"bits": bits}, options={"experts": 2, "rotate": False})
        rows.append(measure(real, recipe, name, tmp_path / "offers"))
        monkeypatch.setattr(QuantExperts, "candidates", None)  # nothing is measured again
    assert rows[0].stored < rows[1].stored <= 6


@pytest.mark.parametrize(("static", "kept"), [(False, [0, 4]), (True, [0])])
def test_static_corrections_are_offered_no_experts(static: bool, kept: list[int], tmp_path: Path) -> None:
    samples = [Sample(None, "some text to calibrate on", kind="text")]
    folder = str(write_small_llama(tmp_path / "model"))
    real = RealModel("smollm2", folder, ("language",), samples, {}, lambda _: ({"kl": 0.0}, [0.0]))
    choices = [Choice(AdapterSize(8, 8 if experts else 0, experts, 8), 0, WeightGrid(4)) for experts in (0, 4)]
    candidates = [Candidate(choice, 1.0, stored=100, read=100) for choice in choices]
    (tmp_path / "offers").mkdir()
    text = offers_to_json({"query": Offer(100, 1.0, candidates)})
    (tmp_path / "offers" / "block.offers.json").write_text(text, encoding="utf-8")
    begin(tmp_path / "work", real, make_recipe(method="qe"), tmp_path / "offers", static=static)
    found = offers_from_json((tmp_path / "work" / "block.offers.json").read_text(encoding="utf-8"))
    assert [one.choice.adapters.experts for one in found["query"].candidates] == kept


def test_variants_stand_beside_the_budget_that_they_change() -> None:
    variant = variant_of("match,polish=4")
    assert variant == {"match": True, "polish": 4}
    found = list(jobs("smollm2", "w4a8", ["gptq"], [4.25], [variant], all_of_ours=False))
    assert [job.name for job in found] == ["gptq", "ours, 4.25 stored", "ours with match,polish=4, 4.25 stored"]
    assert found[2].keys == found[1].keys | {"options": variant}


def test_a_variant_is_compared_with_its_budget_over_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    def row(name: str, seed: int, loss: float) -> Row:
        return Row("smollm2", "w4a8", name, 4.25, 4.25, loss, {"kl": loss}, 1.0, 0.0, seed, "abc", [loss, 3 * loss])

    rows = [row("ours, 4.25 stored", seed, 1.0 + seed) for seed in (0, 1)]
    rows += [row("ours with match, 4.25 stored", seed, 0.5 + 0.5 * seed) for seed in (0, 1, 2)]  # the last is alone
    print_variants(rows)
    assert "x 0.500  0.500 to 0.500  2 seeds" in capsys.readouterr().out
