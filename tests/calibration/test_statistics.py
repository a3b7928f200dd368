from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge.calibration.statistics import (
    DOUBLE_WIDTH,
    GramMatrix,
    StatisticsCollector,
    StatisticsRequest,
    collect_statistics,
    mirror_triangle,
    top_channels,
)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No inputs are rounded."""
    monkeypatch.setattr("qe_edge.numerics.int8_products.multiplies_int8", lambda: False)


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [40, DOUBLE_WIDTH + 8])
@pytest.mark.usefixtures("exact")
def test_gram_matrices_add_up_over_chunks_by_either_library(width: int) -> None:
    tokens = drawn(24, width)
    ours, torchs = GramMatrix(width), GramMatrix(width)
    for start in (0, 10):
        part = tokens[start : start + 10 if start == 0 else 24].contiguous()
        ours.add(part, part.abs().amax(0))
        torchs.add_there(part)
    wanted = (tokens.double().T @ tokens.double()).numpy() / 24
    for found in (ours.mean(24), torchs.mean(24)):
        np.testing.assert_allclose(found, wanted, atol=2e-6)
        assert (found == found.T).all()
        assert found.dtype == (np.float64 if width <= DOUBLE_WIDTH else np.float32)


@pytest.mark.usefixtures("exact")
def test_weighed_tokens_weigh_in_the_gram_matrix_alone() -> None:
    tokens, weights = drawn(300, 12), np.linspace(0, 2, 300)
    tokens[7] = float("nan")
    collector = StatisticsCollector(
        "layer", 12, [torch.ones(4, 12)], StatisticsRequest(tokens=0), seed=0, token_weights=weights
    )
    collector.update(tokens[:90])
    collector.update(tokens[90:])
    with pytest.raises(ValueError, match="more tokens than"):
        collector.update(tokens[:1])
    with pytest.warns(UserWarning, match="1 of 300 tokens"):
        found = collector.finish()[0]
    kept = np.delete(np.arange(300), 7)
    x = tokens.double().numpy()[kept]
    np.testing.assert_allclose(found.gram, (x * weights[kept, None]).T @ x / 299, atol=1e-5)
    np.testing.assert_allclose(found.abs_mean, np.abs(x).mean(0), rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 16, 33])
def test_a_triangle_is_mirrored_tile_by_tile(size: int) -> None:
    matrix = np.arange(size * size, dtype=np.float64).reshape(size, size)
    lower = np.tril(matrix)
    assert (mirror_triangle(matrix, tile=16) == lower + np.tril(matrix, -1).T).all()


@pytest.mark.parametrize("levels", [3, 20, 10**6])
@pytest.mark.parametrize("k", [1, 7, 40, 60])
def test_important_channels_are_those_of_a_full_stable_sort(k: int, levels: int) -> None:
    score = torch.randint(0, levels, (50, 40), generator=torch.Generator().manual_seed(1)).float()
    score[3] = 0.0
    wanted = torch.argsort(score, dim=1, descending=True, stable=True)[:, :k]
    wanted[3] = -1
    assert (top_channels(score, k) == wanted.numpy()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tokens_that_are_not_finite_are_left_out(bad: float) -> None:
    tokens = drawn(300, 16)
    spoilt = tokens.clone()
    spoilt[7, 3] = bad
    request = StatisticsRequest(gram=True, tokens=50, important=4)
    found, wanted = (StatisticsCollector("layer", 16, [drawn(8, 16, 1)], request, 0) for _ in range(2))
    found.update(spoilt)
    wanted.update(torch.cat((tokens[:7], tokens[8:])))
    (one,), (other,) = found.finish(), wanted.finish()
    assert one.dropped == 1
    np.testing.assert_array_equal(one.gram, other.gram)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.importance, other.importance)


def test_magnitudes_are_those_of_all_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.calibration.statistics.CACHED", 3 * 16)  # three tokens at a time
    x = drawn(40, 16)
    found = collect_statistics("layer", torch.ones(4, 16), x, StatisticsRequest(gram=False, tokens=0), 0)
    np.testing.assert_allclose(found.abs_mean, x.abs().double().mean(0), rtol=1e-6)
    np.testing.assert_array_equal(found.abs_max, x.abs().amax(0))


def test_sampled_tokens_stay_what_they_are_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.calibration.statistics.CHUNK", 7)
    tokens, kinds = drawn(30, 16), torch.arange(30, dtype=torch.int8) % 3
    collector = StatisticsCollector("layer", 16, [torch.ones(4, 16)], StatisticsRequest(gram=False, tokens=20), 0)
    collector.update(tokens, kinds)
    (found,) = collector.finish()
    rows = [int((tokens == torch.from_numpy(token)).all(1).nonzero()) for token in found.tokens]
    assert rows == sorted(set(rows))
    assert len(rows) == 20
    np.testing.assert_array_equal(found.token_kind, kinds[rows])
