"""Gram matrices of rounded inputs: exact sums, their noise, and who uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
from qe_edge.numerics import int8_products
from qe_edge.numerics.int8_products import TINY, add_gram, round_channels
from qe_edge.reconstruction.router import ridge_router


def drawn(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Products of two normal variables, which have heavy tails as the inputs of a down projection do."""
    random = np.random.default_rng(seed)
    return np.asarray(random.standard_normal((2, rows, columns)).prod(0), np.float32)


def rounded_gram(x: np.ndarray) -> np.ndarray:
    total = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    add_gram(total, *round_channels(x, np.abs(x).max(0)))
    upper = total.numpy()
    return np.asarray(np.triu(upper) + np.triu(upper, 1).T)


@pytest.mark.parametrize("total", [torch.float32, torch.float64])
def test_the_sum_is_exactly_that_of_the_rounded_inputs(total: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "LONGEST", 7)
    monkeypatch.setattr(int8_products, "PANEL", 5)
    codes, scale = round_channels(drawn(40, 23), np.ones(23, np.float32))
    found = torch.ones(23, 23, dtype=total)
    add_gram(found, codes, scale)
    decoded = codes.double() * scale.double()
    wanted = decoded.T @ decoded + 1
    apart = (found.double() - wanted).triu().abs().max()
    assert apart < 1e-5


@pytest.mark.parametrize("channels", ["rows", "columns"])
def test_no_code_is_further_off_than_half_a_step(channels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "CACHED", 100)  # a few rows at a time
    x = drawn(30, 20) * np.logspace(-20, 20, 20, dtype=np.float32)
    x[:, 3], x[:, 4] = 0.0, TINY / 10
    x = np.ascontiguousarray(x.T) if channels == "rows" else x
    largest = np.abs(x).max(1, keepdims=True) if channels == "rows" else np.abs(x).max(0)
    codes, scale = round_channels(x, largest)
    steps = scale.numpy()[:, None] if channels == "rows" else scale.numpy()
    assert codes.abs().max() == 127
    np.testing.assert_array_less(np.abs(x - codes.numpy() * steps), np.broadcast_to(steps * 0.5001, x.shape))


def test_noise_is_small_against_that_of_sampling_inputs() -> None:
    x = drawn(4096, 200)
    exact = x.astype(np.float64).T @ x
    norm = np.sqrt(np.outer(exact.diagonal(), exact.diagonal()))
    off = ~np.eye(200, dtype=bool)
    noise, sampling = ((rounded_gram(x) - exact) / norm)[off], (exact / norm)[off]  # channels are independent
    assert noise.var() < 1e-3 * sampling.var()


def test_one_huge_input_costs_little_and_the_matrix_stays_positive() -> None:
    x = drawn(4096, 50)
    x[7] *= 1e4
    exact, found = x.astype(np.float64).T @ x, rounded_gram(x)
    root = np.sqrt(exact.diagonal())
    assert (np.abs(found - exact) < 0.02 * np.outer(root, root)).all()  # others round to zero beside it
    assert np.linalg.eigvalsh(found).min() > -1e-6 * np.abs(found).max()


@pytest.mark.parametrize("width", [16, 48])
def test_statistics_take_wide_inputs_rounded(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_products, "LEAST_SIDE", 48)
    monkeypatch.setattr("qe_edge.calibration.statistics.CHUNK", 64)
    tokens = torch.from_numpy(drawn(200, width))
    exact = (tokens.double().T @ tokens.double() / 200).numpy()
    for rounds in (True, False):
        monkeypatch.setattr(int8_products, "multiplies_int8", lambda rounds=rounds: rounds)
        request = StatisticsRequest(gram=True, tokens=0)
        found = collect_statistics("layer", torch.ones(4, width), tokens, request, 0).gram
        assert found is not None
        assert (found == found.T).all()
        apart = float(np.abs(found - exact).max() / exact.max())
        assert (1e-5 < apart < 1e-2) if rounds and width == 48 else apart < 1e-6


@pytest.mark.parametrize("tokens", [40, 400])
def test_a_router_is_as_good_from_rounded_magnitudes(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer tokens than channels, and with more."""
    x = drawn(tokens, 96)
    wanted = np.abs(x) @ np.abs(drawn(96, 3, seed=1)) + 0.1 * drawn(tokens, 3, seed=2)
    monkeypatch.setattr(int8_products, "multiplies_int8", lambda: False)
    exact = np.abs(x) @ ridge_router(x, wanted).T
    monkeypatch.setattr(int8_products, "multiplies_int8", lambda: True)
    monkeypatch.setattr(int8_products, "LEAST_SIDE", 1)
    rounded = np.abs(x) @ ridge_router(x, wanted).T
    assert 0 < np.abs(rounded - exact).max() < 0.05 * exact.std()
    assert (rounded.argmin(1) == exact.argmin(1)).mean() > 0.95
