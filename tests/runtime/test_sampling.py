"""Drawing tokens: the ones that take part are transformers', and the numbers are those of splitmix64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from qe_edge.runtime.sampling import Random, Sampling, choose_token, kept_tokens
from qe_edge.system.errors import InputError


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    st.sampled_from([0, 1, 7, 40, 500]),
    st.floats(0.01, 1),
    st.floats(0, 1),
    st.integers(0, 40),
)
@example(0, 0.05, 0, 1.0, 0.0, 0)
@settings(max_examples=150)
def test_the_tokens_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, suppressed: int
) -> None:
    random = np.random.default_rng(seed)
    logits = random.permutation(np.linspace(-9, 9, 100)) + random.normal(size=100) * 0.01
    logits[:suppressed] = -np.inf
    sampling = Sampling(temperature, top_k, top_p, min_p)
    ids, weights = kept_tokens(logits, sampling)

    scores, none = torch.tensor(logits)[None], torch.zeros((1, 0), dtype=torch.int64)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(min(top_k, 100))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)]
    for warper in warpers:
        scores = warper(none, scores)
    theirs = scores.softmax(-1)[0].numpy()
    likely = ids[weights / weights.sum() > 1e-14]  # of sums that are rounded, the rest may be lost
    assert sorted(likely.tolist()) == np.flatnonzero(theirs > 1e-14).tolist()
    assert np.allclose(weights / weights.sum(), theirs[ids], rtol=1e-12)
    assert (np.diff(weights) <= 0).all()


def test_the_numbers_are_those_of_the_reference() -> None:
    """The reference program's output for 1234567, as published with it."""
    random = Random(1234567)
    words = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [random.next() for _ in words] == [(word >> 11) * 2.0**-53 for word in words]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.3, 0.4]))
    random, count = Random(3), 5000
    drawn = [choose_token(logits, Sampling(temperature=1.0), random) for _ in range(count)]
    assert np.abs(np.bincount(drawn) / count - np.exp(logits)).max() < 0.02
    halved = [choose_token(logits, Sampling(temperature=0.5, top_k=2), random) for _ in range(count)]
    assert np.abs(np.bincount(halved, minlength=4) / count - [0, 0, 9 / 25, 16 / 25]).max() < 0.02


def test_equal_tokens_stand_in_the_order_of_their_ids() -> None:
    logits = np.array([1.0, 5.0, 1.0, 5.0, 1.0])
    assert kept_tokens(logits, Sampling(temperature=1.0))[0].tolist() == [1, 3, 0, 2, 4]
    assert kept_tokens(logits, Sampling(temperature=1.0, top_k=3))[0].tolist() == [1, 3, 0, 2, 4]  # as many as equal
    assert kept_tokens(logits, Sampling(temperature=1.0, top_p=0.0))[0].tolist() == [1]
    assert choose_token(logits, Sampling(), Random(0)) == 1


@pytest.mark.parametrize("shift", [0.0, -9.0], ids=["up", "down"])
def test_a_temperature_next_to_zero_takes_the_most_likely_token(shift: float) -> None:
    logits = np.array([1.0, 5.0, 1.0, 5.0, -np.inf], np.float32) + np.float32(shift)
    assert choose_token(logits, Sampling(temperature=1e-310, top_k=2), Random(0)) == 1


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = np.random.default_rng(0).normal(size=1000)
    sampling = Sampling(temperature=1.0)

    def draw(seed: int | None) -> list[int]:
        random = Random(seed)
        return [choose_token(logits, sampling, random) for _ in range(20)]

    assert draw(5) == draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_a_temperature_that_leaves_one_token() -> None:
    logits = np.array([0.0, 900.0, 899.0, -np.inf])
    assert {choose_token(logits, Sampling(temperature=1e-3), Random(seed)) for seed in range(20)} == {1}
    assert choose_token(np.full(3, -np.inf), Sampling(temperature=1.0), Random(0)) == 0  # as the most likely one


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": True}, "min_p is True"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.0}, "top_k is 2.0"),
    ],
)
def test_values_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Sampling(**values)
    assert caught.value.remedy.startswith("Give a")


@pytest.mark.parametrize("seed", [-1, 1.5, 1 << 64])
def test_seeds_that_are_none(seed: int) -> None:
    with pytest.raises(InputError, match="seed"):
        Random(seed)
