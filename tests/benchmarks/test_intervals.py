"""Intervals of a ratio of losses: paired over samples, over all seeds."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.intervals import ratio_interval


def test_samples_that_differ_much_say_much_where_both_sides_see_the_same() -> None:
    rng = np.random.default_rng(0)
    other = rng.lognormal(sigma=2, size=(3, 40))
    paired = ratio_interval(0.8 * other * rng.normal(1, 0.01, (3, 40)), other)
    assert paired.ratio == pytest.approx(0.8, rel=0.01)
    assert 0.78 < paired.low < paired.ratio < paired.high < 0.82
    apart = ratio_interval(0.8 * rng.permuted(other, axis=1), other)
    assert apart.high - apart.low > 10 * (paired.high - paired.low)


def test_seeds_are_drawn_too() -> None:
    other = np.ones((4, 40))
    found = ratio_interval(np.array([0.5, 0.6, 1.4, 1.5])[:, None] * other, other)
    assert (found.ratio, found.low, found.high) == (1.0, 0.5, 1.5)
