"""Directions of low-rank corrections: the smaller side's coordinates, Krylov steps, experts' covariances."""

from __future__ import annotations

import numpy as np
import pytest

from qe_edge.reconstruction.directions import (
    EXACT_SIDE,
    KRYLOV_STEPS,
    WARM_STEPS,
    ErrorSpace,
    leading_directions,
    top_eigenvectors,
)
from qe_edge.reconstruction.experts import mixed_covariance


@pytest.mark.parametrize("apart", [1.0, 1e-9])
def test_error_space_keeps_the_smaller_side(apart: float) -> None:
    error = np.random.default_rng(0).standard_normal((30, 12))
    error[:, 7] = error[:, 3] + apart * error[:, 7]  # columns that nearly coincide have no Cholesky factor to rely on
    space = ErrorSpace.of(error)
    assert space.side == 12
    basis = space.lift(np.eye(12))
    np.testing.assert_allclose(basis.T @ basis, np.eye(12), atol=1e-12)
    np.testing.assert_allclose(basis @ space.reduced, error, atol=1e-12)
    np.testing.assert_allclose(space.coordinates(error), space.reduced, atol=1e-12)


@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-5])
def test_error_space_of_float32_is_as_orthonormal_as_that_can_be(apart: float) -> None:
    error = np.random.default_rng(0).standard_normal((300, 12)).astype(np.float32)
    error[:, 7] = error[:, 3] + apart * error[:, 7]
    space = ErrorSpace.of(error)
    basis = space.lift(np.eye(12))
    np.testing.assert_allclose(basis.T @ basis, np.eye(12), atol=1e-6)
    np.testing.assert_allclose(basis @ space.reduced, error, atol=3e-4)
    assert space.reduced.dtype == np.float64


def test_a_covariance_is_computed_from_one_triangle_of_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.reconstruction.directions.PANEL", 5)
    drawn = np.random.default_rng(0)
    error, tokens = drawn.standard_normal((7, 23)), drawn.standard_normal((40, 23))
    gram = tokens.T @ tokens
    np.testing.assert_allclose(ErrorSpace.of(error).covariance(gram), error @ gram @ error.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_outputs_of_wide_inputs_come_from_bfloat16(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.reconstruction.directions.LONG_SUM", 20)
    monkeypatch.setattr("qe_edge.reconstruction.directions.multiplies_bfloat16", lambda: True)
    drawn = np.random.default_rng(0)
    error, tokens = drawn.standard_normal((7, 23)).astype(dtype), drawn.standard_normal((40, 23)).astype(dtype)
    found = ErrorSpace.of(error).outputs(tokens)
    apart = np.abs(found - tokens @ error.T).max()
    assert found.dtype == dtype
    assert (1e-4 < apart < 0.1) if dtype == np.float32 else apart < 1e-12


@pytest.mark.parametrize("steps", [KRYLOV_STEPS, WARM_STEPS])
def test_krylov_directions_capture_what_the_eigenvectors_do(steps: int) -> None:
    drawn = np.random.default_rng(0)
    outputs = drawn.standard_normal((700, 600)) / np.sqrt(np.arange(1, 601))
    matrix, alike = outputs.T @ outputs, outputs[:400].T @ outputs[:400]
    start = np.zeros((600, 0)) if steps == KRYLOV_STEPS else top_eigenvectors(alike, 24)
    exact, found = top_eigenvectors(matrix, 24), leading_directions(matrix.astype(np.float32), start, 24, steps)
    energy, best = (float(np.trace(u.T @ matrix @ u)) for u in (found, exact))
    assert energy > (1 - 1e-3) * best
    np.testing.assert_allclose(found.T @ found, np.eye(24), atol=1e-5)


@pytest.mark.parametrize("side", [64, EXACT_SIDE + 44])
def test_an_experts_covariance_multiplies_as_the_mixture_it_is(side: int) -> None:
    drawn = np.random.default_rng(0)
    own = drawn.standard_normal((90, side)).astype(np.float32)
    everyone, block = (own.T @ own)[::-1, ::-1].copy(), drawn.standard_normal((side, 5)).astype(np.float32)
    expected = (0.75 / 90 * own.T.astype(float) @ own + 0.25 * everyone.astype(float)) @ block
    found = mixed_covariance(own, everyone, 0.25) @ block
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    whole = mixed_covariance(own, everyone, 0.25) @ np.eye(side, dtype=np.float32)
    directions = leading_directions(mixed_covariance(own, everyone, 0.25), np.zeros((side, 0)), side // 2)
    best = top_eigenvectors(whole.astype(np.float64), side // 2)
    energy, most = (float(np.trace(u.T @ whole @ u)) for u in (directions, best))
    assert energy == pytest.approx(most, rel=1e-5)
