"""Correlations of few tokens are trusted less, which pays on tokens that were not seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.reconstruction.shrinkage import chosen_strength, shrunk_gram


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_diagonal_stays_and_the_rest_shrinks_by_the_share_of_added_tokens(kind: type) -> None:
    x = np.random.default_rng(0).normal(size=(30, 10)) + 1
    gram = kind(x.T @ x / 30)
    before = np.asarray(gram).copy()
    found = np.asarray(shrunk_gram(gram, tokens=30, strength=2.0))
    np.testing.assert_array_equal(np.asarray(gram), before)
    np.testing.assert_array_equal(np.diag(found), np.diag(before))
    apart = ~np.eye(10, dtype=bool)
    np.testing.assert_allclose(found[apart], before[apart] * 30 / (30 + 2 * 10))


@pytest.mark.parametrize(("coupling", "gain"), [(0.3, 0.97), (2.0, 1.05)])
def test_layers_lose_less_on_tokens_that_were_not_seen(coupling: float, gain: float) -> None:
    torch.manual_seed(0)
    mixing = torch.eye(128) + coupling * torch.randn(128, 128) / 128**0.5
    weight, tokens = torch.randn(48, 128), torch.randn(3000, 128) @ mixing
    seen, other = tokens[:300], tokens[300:]
    lost = {}
    for strength in (0.0, "auto"):
        options = {"shrinkage": strength, "polish": 2, "experts": 0, "shared_rank": 8}
        layer = quantize_linear(weight, seen, make_recipe(method="qe", scheme="w4a16", options=options))
        lost[strength] = float((layer(other) - other @ weight.T).square().mean())
    assert lost["auto"] < gain * lost[0.0]  # where correlations are strong, nothing is to be gained
    strength = chosen_strength(seen)
    assert strength > 0.5 if coupling < 1 else strength <= 0.5


def test_one_token_and_dead_channels_are_no_trouble() -> None:
    assert chosen_strength(torch.ones(1, 8)) == 0.0
    dead = torch.randn(40, 8)
    dead[:, 3] = 0
    assert chosen_strength(dead) >= 0
    assert chosen_strength(torch.zeros(40, 8)) == 0.0
