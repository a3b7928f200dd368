"""Divergence, agreement and relative error on distributions that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from qe_edge.system.errors import NumericalError
from qe_edge.validate.metrics import LogitsDistance, RelativeError, kl_divergence


def test_kl_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl_divergence(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(q, p).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_kl_ignores_an_offset_of_the_logits() -> None:
    logits = torch.randn(5, 7)
    assert kl_divergence(logits, logits + 100).abs().max() < 1e-6


def test_kl_of_a_token_that_the_reference_excludes() -> None:
    p, q = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence(p, q).item() == pytest.approx(math.log(2))
    assert kl_divergence(p, p).item() == 0.0
    assert math.isinf(kl_divergence(q, p).item())


def test_agreement_and_mean_over_uneven_batches() -> None:
    reference, other = torch.randn(600, 5), torch.randn(600, 5)
    at_once, in_parts = LogitsDistance(), LogitsDistance()
    at_once.add(reference, other)
    for start, stop in ((0, 1), (1, 300), (300, 600)):
        in_parts.add(reference[start:stop], other[start:stop])
    assert at_once.agreement() == in_parts.agreement() == (reference.argmax(1) == other.argmax(1)).double().mean()
    assert at_once.mean_divergence() == pytest.approx(in_parts.mean_divergence())
    assert at_once.mean_divergence() == pytest.approx(kl_divergence(reference, other).mean().item())


def test_nothing_measured_is_not_zero() -> None:
    assert LogitsDistance().mean_divergence() is None
    assert LogitsDistance().agreement() is None
    assert RelativeError().value() is None


def test_relative_error() -> None:
    error = RelativeError()
    error.add(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    error.add(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 4.0]]))
    assert error.value() == pytest.approx(3 / 5)
    assert error.rows == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_no_perfect_score(bad: float) -> None:
    good, broken = torch.ones(3, 4), torch.ones(3, 4)
    broken[1, 2] = bad
    for measure in (RelativeError(), LogitsDistance()):
        with pytest.raises(NumericalError, match="outputs of the engine hold NaN"):
            measure.add(good, broken, ("the original", "the engine"))
        with pytest.raises(NumericalError, match="outputs of the original hold NaN") as caught:
            measure.add(broken, broken, ("the original", "the engine"))
        assert "quantize again" in caught.value.remedy


def test_something_where_there_should_be_nothing() -> None:
    error = RelativeError()
    error.add(torch.zeros(2, 3), torch.zeros(2, 3))
    assert error.value() is None
    error.add(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(NumericalError, match="zero everywhere"):
        error.value()
