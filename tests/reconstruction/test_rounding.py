"""Roundings of the main branch, alone and under Quant Experts' correction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qe_edge import QELinear, make_recipe, quantize_linear
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid, quantize_weight, round_on_grid, scales_of_range
from qe_edge.reconstruction import gptq
from qe_edge.reconstruction.branches import leave_out_channels
from qe_edge.reconstruction.gptq import Hessian, gptq_round
from qe_edge.reconstruction.range_search import CLIP_LEAST, clipped_round
from qe_edge.reconstruction.rounding import Rounding
from qe_edge.system.errors import NumericalError
from tests.layers import correlated_layer


@settings(max_examples=40)
@given(
    bits=st.integers(2, 4),
    group=st.sampled_from([PER_CHANNEL, 16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_searched_range_is_never_worse(bits: int, group: int, symmetric: bool, seed: int) -> None:
    """Scale by scale, in the norm that the search minimises."""
    torch.manual_seed(seed)
    weight = torch.randn(5, 64) * torch.rand(64).exp()
    weight[0] = 0
    importance = torch.rand(64)
    grid = WeightGrid(bits, group, symmetric)
    size = 64 if group == PER_CHANNEL else group

    def losses(decoded: Tensor) -> Tensor:
        return ((decoded - weight).square() * importance).reshape(5, -1, size).sum(-1)

    plain, searched = quantize_weight(weight, grid), clipped_round(weight, grid, importance)
    assert torch.all(losses(searched.decode()) <= losses(plain.decode()) * (1 + 1e-5) + 1e-12)
    assert not searched.decode()[0].any()
    assert searched.scales.shape == plain.scales.shape


@pytest.mark.parametrize(("bits", "symmetric"), [(3, False), (4, False), (4, True)])
def test_a_range_searched_in_two_passes_is_as_good_as_every_range_tried(bits: int, symmetric: bool) -> None:
    drawn = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(256, 128, generator=drawn), torch.rand(128, generator=drawn)
    grid = WeightGrid(bits, PER_CHANNEL, symmetric)

    def losses(decoded: Tensor) -> Tensor:
        return ((decoded - weight).square() * importance).sum(-1)

    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    tried = []
    for share in torch.linspace(1.0, CLIP_LEAST, 25).tolist():
        scales, zeros = scales_of_range(low * share, high * share, grid)
        tried.append(losses(round_on_grid(weight, scales, zeros, grid).decode()))
    best = torch.stack(tried).amin(0).sum()
    assert losses(clipped_round(weight, grid, importance).decode()).sum() < 1.002 * best


def output_error(rounding: Rounding, weight: Tensor, x: Tensor, channels: np.ndarray) -> tuple[float, Tensor]:
    gram = (x.double().T @ x.double() / len(x)).numpy()
    mean = x.abs().double().mean(0).numpy()
    grid = WeightGrid(4, PER_CHANNEL)
    branch = leave_out_channels(weight, grid, channels, mean, "drop", rounding, Hessian(gram))
    factor = torch.ones(weight.shape[1]) if branch.inv_omega is None else branch.inv_omega.float()
    decoded = branch.weight.decode()
    found = weight.double() - decoded.double() * factor.double()
    assert np.allclose(found.numpy(), branch.error, atol=1e-12)
    return float(np.sqrt(np.einsum("ij,ij->", branch.error @ gram, branch.error))), decoded


@pytest.mark.parametrize("channels", [[], [3, 17, 40]])
def test_second_order_rounding_leaves_less(channels: list[int]) -> None:
    weight, x = correlated_layer(80, 64, 600)
    left_out = np.array(channels, np.int64)
    errors = {}
    for kind, clip in (("nearest", False), ("nearest", True), ("awq", False), ("gptq", False), ("gptq", True)):
        errors[kind, clip], decoded = output_error(Rounding(kind, clip), weight, x, left_out)
        assert not decoded[:, channels].any()  # what the branch leaves out makes up for no other channel
    nearest = errors["nearest", False]
    assert errors["gptq", False] < 0.9 * nearest
    assert errors["gptq", True] < 0.9 * nearest
    assert errors["awq", False] <= nearest * (1 + 1e-6)


@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
def test_the_correction_follows_any_rounding(scheme: str) -> None:
    """GPTQ or AWQ under Quant Experts: at the same bits, better than nearest rounding under the same correction."""
    weight, x = correlated_layer(96, 128, 2000)
    exact = x @ weight.T

    def error(**options: object) -> float:
        layer = quantize_linear(weight, x, make_recipe(method="qe", scheme=scheme, options=options))
        assert isinstance(layer, QELinear)
        return float((layer(x) - exact).norm() / exact.norm())

    nearest = error(rounding="nearest", clip=False)
    assert error(rounding="gptq", clip=False) < nearest
    assert error(rounding="gptq", clip=True) < nearest
    assert error(rounding="awq", clip=False) < 1.1 * nearest


def test_what_needs_a_gram_matrix_says_so() -> None:
    with pytest.raises(NumericalError, match="Rounding 'gptq' needs the Gram matrix"):
        Rounding("gptq")(torch.ones(4, 16), WeightGrid(4, PER_CHANNEL), None, np.ones(16))


def test_gptq_factors_a_gram_matrix_in_its_own_precision() -> None:
    """The codes are those of float64, but for a few that lie between two."""
    weight, x = correlated_layer(48, 96, 4000)
    gram = (x.T @ x / len(x)).double()
    exact, found = (gptq_round(weight, matrix.numpy(), WeightGrid(4), 0.01).codes for matrix in (gram, gram.float()))
    assert (exact != found).double().mean() < 0.01


def test_gptq_goes_on_in_float64_where_float32_ends() -> None:
    """A matrix of rank 1 with little damping: float32's rounding makes it indefinite."""
    column = torch.linspace(1, 2, 128)
    gram = (column[:, None] * column).float().numpy()
    assert torch.isfinite(gptq_round(torch.randn(8, 128), gram, WeightGrid(4), 1e-6).decode()).all()
    with pytest.raises(NumericalError, match="not positive definite"):
        gptq_round(torch.randn(8, 128), -gram, WeightGrid(4), 1e-6)


def test_a_hessian_is_factored_once_for_every_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    factor = gptq._coupling
    monkeypatch.setattr(gptq, "_coupling", lambda *given: calls.append(given[-1]) or factor(*given))
    weight, x = correlated_layer(16, 32, 200)
    gram = (x.T @ x / len(x)).double().numpy()
    hessian = Hessian(gram)
    for damping in (0.01, 0.5, 0.01):
        found = gptq_round(weight, hessian, WeightGrid(4), damping).codes
        assert torch.equal(found, gptq_round(weight, gram, WeightGrid(4), damping).codes)
    assert calls == [0.01, 0.01, 0.5, 0.5, 0.01]


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_channels_that_are_left_out_count_as_zero_inputs(precision: type) -> None:
    weight, x = correlated_layer(16, 32, 200)
    gram, channels = (x.T @ x / len(x)).double().numpy().astype(precision), np.array([0, 7, 31])
    before, cleared = gram.copy(), gram.copy()
    cleared[channels, :] = 0.0
    cleared[:, channels] = 0.0
    hessian = Hessian(gram, channels)
    assert np.array_equal(hessian.matrix(), cleared)
    found, wanted = (one.coupling(0.01).triu() for one in (hessian, Hessian(cleared)))
    assert torch.equal(found, wanted)
    codes, exact = (gptq_round(weight, one, WeightGrid(4), 0.01, clip=True) for one in (hessian, cleared))
    assert torch.equal(codes.codes, exact.codes)
    assert torch.equal(codes.scales, exact.scales)
    assert np.array_equal(gram, before)


def test_rows_in_parts_have_the_codes_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = correlated_layer(100, 32, 200)
    gram = (x.T @ x / len(x)).double().numpy()
    whole = gptq_round(weight, gram, WeightGrid(4), 0.01)
    monkeypatch.setattr(gptq, "WEIGHTS", 32 * 12)  # 12 rows at a time
    assert [gptq._piece(rows, 32) for rows in (5, 12, 13, 100)] == [5, 12, 7, 10]
    parts = gptq_round(weight, gram, WeightGrid(4), 0.01)
    assert (parts.codes != whole.codes).float().mean() < 0.001  # sums of other lengths round otherwise
    assert torch.equal(parts.scales, whole.scales)


@pytest.mark.parametrize("wide", [True, False])
def test_a_wide_layer_keeps_one_factored_matrix(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "WIDE", 31 if wide else 32)
    hessian = Hessian(np.eye(32))
    hessian.coupling(0.01)
    assert hessian.without(np.zeros(0, np.int64)) is hessian
    assert list(hessian._couplings) == [0.01]
    assert hessian.without(np.array([3])).left_out.tolist() == [3]
    assert list(hessian._couplings) == ([] if wide else [0.01])
