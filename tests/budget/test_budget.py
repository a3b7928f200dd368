"""Budgets: the knapsack is optimal, keeps its limits, and a model quantized under one has the bits it was given."""

from __future__ import annotations

import ctypes
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qe_edge import make_recipe, quantize, quantize_linear
from qe_edge.budget import allocation as budget
from qe_edge.budget.accounting import count_bits
from qe_edge.budget.allocation import GAP, allocate, output_factors, scaled_back
from qe_edge.budget.model import AdapterSize, Budget, Candidate, Choice, Offer, offers_from_json, offers_to_json
from qe_edge.budget.sizes import predicted_bits
from qe_edge.calibration.statistics import collect_statistics
from qe_edge.checkpoint.layer_files import read_layers, write_layers
from qe_edge.layers.linear import QELinear
from qe_edge.numerics.grids import WeightGrid
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.errors import RecipeError
from qe_edge.validate.subjects import block_groups
from tests.layers import correlated_layer, typed_layer

QUICK = {"tokens": 128, "em_steps": 1}


def test_what_the_solver_prints_is_not_seen(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints from C, into a buffer that outlives the call where standard output is a file."""
    library, solve = ctypes.CDLL(None), budget.milp

    def milp(*arguments: object, **keywords: object) -> object:
        library.printf(b"HighsMipSolverData::something\n")
        return solve(*arguments, **keywords)

    monkeypatch.setattr(budget, "milp", milp)
    library.printf(b"before\n")
    allocate({"layer": Offer(1, 1.0, [candidate(1.0, 4.0, 4.0)])}, Budget(bits=8))
    library.printf(b"after\n")
    library.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def candidate(loss: float, stored: float, read: float) -> Candidate:
    return Candidate(Choice(AdapterSize(), left_out=0, grid=WeightGrid(4)), loss, stored, read)


CANDIDATES = st.builds(
    candidate,
    loss=st.just(0.0) | st.floats(1e-200, 1e6),  # the allocation takes less than 1e-300 for nothing
    stored=st.integers(1, 60).map(float),
    read=st.integers(1, 60).map(float),
)
OFFERS = st.lists(
    st.builds(
        Offer,
        weights=st.integers(1, 20),
        sensitivity=st.floats(0.01, 100),
        candidates=st.lists(CANDIDATES, min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=80)
@given(offers=OFFERS, bits=st.one_of(st.none(), st.floats(0.5, 16)), read=st.one_of(st.none(), st.floats(0.5, 16)))
def test_the_allocation_is_the_best_of_all(offers: list[Offer], bits: float | None, read: float | None) -> None:
    named = {f"layer{index}": offer for index, offer in enumerate(offers)}
    weights = sum(offer.weights for offer in offers)
    best = np.inf
    for picked in itertools.product(*(offer.candidates for offer in offers)):
        stored_bits, read_bits = sum(one.stored for one in picked), sum(one.read for one in picked)
        if (bits is None or stored_bits <= bits * weights) and (read is None or read_bits <= read * weights):
            best = min(best, sum(one.loss * offer.sensitivity for one, offer in zip(picked, offers, strict=True)))
    budget = Budget(bits=bits, read_bits=read)
    if best == np.inf:
        with pytest.raises(RecipeError):
            allocate(named, budget)
        return
    found = allocate(named, budget)
    taken = [next(one for one in offer.candidates if one.choice is found[name]) for name, offer in named.items()]
    for limit, used in ((bits, sum(one.stored for one in taken)), (read, sum(one.read for one in taken))):
        assert limit is None or used <= limit * weights * (1 + 1e-6)
    losses = [one.loss * offer.sensitivity for one, offer in zip(taken, offers, strict=True)]
    largest = max(one.loss * offer.sensitivity for offer in offers for one in offer.candidates)
    assert sum(losses) <= best + GAP * best + 1e-6 * largest


def test_offers_survive_the_disk() -> None:
    choice = Choice(AdapterSize(8, 8, 4, 4), left_out=16, grid=WeightGrid(3, 64, symmetric=False))
    offers = {"a": Offer(10, 0.5, [Candidate(choice, 1.25, 40.0, 30.0)])}
    assert offers_from_json(offers_to_json(offers)) == offers
    with pytest.raises(ValueError, match="no offers"):
        offers_from_json(offers_to_json(offers).replace('"bits": 3', '"bits": 9'))
    for damaged in ("[]", "{", '{"a": 1}', '{"a": {"weights": 1, "sensitivity": 1, "candidates": [{}]}}'):
        with pytest.raises(ValueError, match=r"."):
            offers_from_json(damaged)


def problem(scheme: str = "w4a8", **options: object) -> tuple[LinearProblem, torch.Tensor]:
    weight, x = typed_layer(96, 128, 1200)
    recipe = make_recipe(method="qe", scheme=scheme, options=options)
    request = recipe.build_method().request(*weight.shape)
    assert request is not None
    statistics = collect_statistics("layer", weight, x, request, 0)
    return LinearProblem("layer", weight, recipe.get_scheme(), statistics, 0), x


@pytest.mark.parametrize("scheme", ["w4a8", "w4a6", "w4a16", "w3a16"])
def test_candidates_keep_their_word(scheme: str) -> None:
    """What a layer then costs is what its candidate said, and it leaves about the error that it said."""
    given_problem, x = problem(scheme)
    method = make_recipe(method="qe", scheme=scheme).build_method()
    candidates = method.candidates(given_problem)
    assert len(candidates) > 3
    losses = []
    for one in candidates:
        layer = QELinear(method.quantize(replace(given_problem, choice=one.choice)))
        found = count_bits(torch.nn.ModuleDict({"layer": layer}), {}).total
        experts = one.choice.adapters.experts
        if layer.num_experts == experts or experts < 2:
            assert found.stored_bits * found.weights == pytest.approx(one.stored)
            assert found.read == pytest.approx(one.read)
        error = float((layer(x) - x @ given_problem.weight.T).square().sum(1).mean())
        losses.append((one.loss, error))
    said, left = (np.array(column) for column in zip(*losses, strict=True))
    assert np.all(left <= 1.5 * said + 1e-6 * left.max())
    assert np.corrcoef(np.log(said), np.log(left))[0, 1] > 0.9


def test_a_budget_is_never_worse_than_its_static_part() -> None:
    candidates = make_recipe(method="qe").build_method().candidates(problem()[0])
    static = [one for one in candidates if not one.choice.adapters.experts]
    assert len(static) < len(candidates)
    for bits in (4.5, 5.0, 6.0, 7.0):
        everything = {"layer": Offer(96 * 128, 1.0, candidates)}
        chosen, rest = (
            next(one.loss for one in candidates if one.choice is allocate(offers, Budget(read_bits=bits))["layer"])
            for offers in (everything, {"layer": Offer(96 * 128, 1.0, static)})
        )
        assert chosen <= rest


@pytest.mark.parametrize("bits", [4.3, 5.0])
@pytest.mark.parametrize("kind", ["bits", "read_bits"])
def test_a_model_gets_the_bits_it_was_given(small: str, kind: str, bits: float) -> None:
    loaded, recipe = quantize(
        small, make_recipe(method="qe", budget={kind: bits}, calibration={"samples": 4}, options=QUICK)
    )
    found = count_bits(loaded.model, block_groups(loaded)).total
    used = found.stored_bits if kind == "bits" else found.read_bits
    assert bits - 0.25 < used <= bits + 1e-6
    assert getattr(recipe.budget, kind) == bits


def test_a_budget_below_the_codes_is_refused(small: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be met: codes and scales alone take 3\."):
        quantize(small, make_recipe(method="qe", budget={"bits": 3.0}, calibration={"samples": 4}, options=QUICK))


def test_a_method_of_one_size_takes_no_budget() -> None:
    with pytest.raises(RecipeError, match="cannot spend a budget"):
        make_recipe(method="rtn", budget={"bits": 4.5})


def test_a_measured_run_is_not_measured_again(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(method="qe", budget={"bits": 4.4}, calibration={"samples": 4}, options=QUICK)
    whole, _ = quantize(small, recipe, work=tmp_path / "work")
    for path in (tmp_path / "work").glob("*.safetensors"):
        if path.name != "gradients.safetensors":
            path.unlink()

    def refuse(*_arguments: object) -> list[Candidate]:
        raise AssertionError("measured twice")

    monkeypatch.setattr("qe_edge.methods.qe.QuantExperts.candidates", refuse)
    again, _ = quantize(small, recipe, work=tmp_path / "work", resume=True)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


@pytest.mark.parametrize("dtype", ["int4", "int8", "float16"])
@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
def test_scaling_rows_by_powers_of_two_is_exact(dtype: str, scheme: str) -> None:
    weight, x = typed_layer(80, 64, 600)
    factors = torch.from_numpy(output_factors(np.exp(np.random.default_rng(0).normal(0, 3, 80)))).float()
    assert factors.min() < 1 < factors.max()
    assert torch.equal(factors, torch.exp2(factors.log2().round()))
    given_problem, _ = problem(scheme, adapter_dtype=dtype)
    recipe = make_recipe(method="qe", scheme=scheme, options={"adapter_dtype": dtype})
    method = recipe.build_method()
    scaled = weight * factors.unsqueeze(1)
    request = method.request(*weight.shape)
    assert request is not None
    result = method.quantize(
        LinearProblem("layer", scaled, given_problem.scheme, collect_statistics("layer", scaled, x, request, 0), 0)
    )
    expected = QELinear(result)(x) / factors
    assert torch.allclose(
        QELinear(scaled_back(result, factors))(x), expected, rtol=1e-5, atol=1e-6 * expected.abs().max()
    )


def test_int4_factors_hold_twice_the_rank_and_survive_the_disk(tmp_path: Path) -> None:
    weight, x = correlated_layer(96, 128, 1200)
    outputs = x @ weight.T
    errors, bits = {}, {}
    for dtype, rank in (("int8", 8), ("int4", 16), ("float32", 16)):
        options = {
            "adapter_dtype": dtype,
            "shared_rank": rank,
            "experts": 0,
            "shrink": False,
            "guard_independent_channels": False,
        }
        options["important_channels"] = 0
        layer = quantize_linear(weight, x, make_recipe(method="qe", scheme="w4a16", options=options))
        errors[dtype] = float((layer(x) - outputs).norm() / outputs.norm())
        bits[dtype] = count_bits(torch.nn.ModuleDict({"layer": layer}), {}).total.stored_bits
        write_layers(tmp_path / dtype, {"layer": layer})
        again = read_layers(tmp_path / dtype)["layer"]
        assert torch.equal(again(x), layer(x))
    assert bits["int4"] == pytest.approx(bits["int8"], rel=0.01)
    assert errors["int4"] < 0.95 * errors["int8"]
    assert errors["int4"] < 1.1 * errors["float32"]


@pytest.mark.parametrize("experts", [0, 4])
def test_predicted_bits_of_int4_factors(experts: int) -> None:
    weight, x = typed_layer(96, 130, 1200)
    options = {"adapter_dtype": "int4", "shared_rank": 16, "routed_rank": 8, "experts": experts, "shrink": False}
    recipe = make_recipe(method="qe", scheme="w4a8", options=options)
    layer = quantize_linear(weight, x, recipe)
    size = AdapterSize(16, 8 if experts else 0, experts, 4)
    expected = predicted_bits(96, 130, recipe.get_scheme(), size, scaled=layer.inv_omega is not None)
    assert count_bits(torch.nn.ModuleDict({"layer": layer}), {}).total == expected


def test_what_is_stored_beside_the_layers_is_taken_off_every_limit() -> None:
    assert Budget(bits=4.25).without(0.25) == Budget(bits=4.0)
    assert Budget(bits=4.5, read_bits=4.25).without(0.25) == Budget(bits=4.25, read_bits=4.0)
