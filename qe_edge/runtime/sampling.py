"""Chooses the next token: the most likely one, or one drawn at random. The C++ runtime follows the same rules.

Everything is computed in float64 from the logits after `qe_edge.runtime.generation.adjust_logits`:

1. Logits are divided by the temperature.
2. `top_k` keeps the k highest logits, and all that equal the lowest of them.
3. The kept tokens are ordered: highest first, equal ones by id. A token's weight is exp(its logit - the highest one).
4. `top_p` keeps a token if the weights before it sum to less than `top_p` times all of them. The first always stays.
5. `min_p` keeps a token if its weight is at least `min_p`; the first one's is 1.
6. u is a number in [0, 1). The first token whose cumulative weight is above u times their sum is taken.

Steps 1 to 5 are transformers' logits warpers of these names, one after the other.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np

from qe_edge.system.errors import InputError, shown

WORD = (1 << 64) - 1
MAX_TEMPERATURE = 100.0  # above, every token is as likely as any other


@dataclass(frozen=True)
class Sampling:
    """The rule that chooses a token.

    Attributes:
        temperature: Above 1 answers vary more, below 1 less; 0 takes the most likely token, and the rest is not used.
        top_k: Number of tokens that take part; 0 for all.
        top_p: Share of the probability that takes part, from 0 to 1.
        min_p: Least probability that takes part, as a share of the highest one, from 0 to 1.

    Raises:
        InputError: If one of them makes no sense.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, MAX_TEMPERATURE)
        _check_number("top_p", self.top_p, 1)
        _check_number("min_p", self.min_p, 1)
        check_count("top_k", self.top_k, 0)


class Random:
    """Numbers in [0, 1) with 53 bits: the upper bits of splitmix64, whose state starts at the seed.

    Args:
        seed: From 0 to 2^64 - 1; None takes one that nobody can guess.

    Raises:
        InputError: If it is no such number.

    Source:
        G. Steele, D. Lea, C. Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.

    Example:
        >>> numbers = Random(0)
        >>> numbers.next(), numbers.next()
        (0.8833108082136426, 0.43152799704850997)
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is None:
            seed = secrets.randbits(64)
        check_count("seed", seed, 0)
        if seed > WORD:
            raise InputError(f"The seed {shown(seed)} has more than 64 bits.", "Give a number below 2^64.")
        self._state = int(seed)

    def next(self) -> float:
        """The next number."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & WORD
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & WORD
        return ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53


def choose_token(logits: np.ndarray, sampling: Sampling, random: Random) -> int:
    """The next token.

    Args:
        logits: `[vocabulary]` floats; -inf for what must not come.
        sampling: The rule.
        random: Source of the number; not used at temperature 0.

    Returns:
        Its id. At temperature 0 the lowest id among equally likely tokens.

    Example:
        >>> choose_token(np.array([0.0, 3.0, 3.0]), Sampling(), Random(0))
        1
        >>> choose_token(np.array([0.0, 3.0, 3.0]), Sampling(temperature=1.0, top_k=2), Random(0))
        2
    """
    # a temperature next to 0 makes scores infinite: then the most likely token is taken
    if sampling.temperature == 0 or not math.isfinite(float(logits.max()) / sampling.temperature):
        return int(logits.argmax())
    ids, weights = kept_tokens(logits, sampling)
    summed = np.cumsum(weights)
    place = np.searchsorted(summed, random.next() * summed[-1], side="right")
    return int(ids[min(int(place), len(ids) - 1)])


def kept_tokens(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that take part, most likely first.

    Args:
        logits: `[vocabulary]` floats; -inf for what must not come, and at least one that is finite.
        sampling: The rule, with a temperature above 0.

    Returns:
        Ids int64 `[kept]` and weights float64 `[kept]`, the first of which is 1.

    Example:
        >>> logits = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
        >>> ids, weights = kept_tokens(logits, Sampling(temperature=1.0, top_p=0.7))
        >>> ids, weights.round(2)
        (array([0, 1]), array([1. , 0.6]))
    """
    scores = logits.astype(np.float64) / sampling.temperature
    ids = np.flatnonzero(scores > -np.inf)
    if 0 < sampling.top_k < len(ids):
        lowest = np.partition(scores[ids], -sampling.top_k)[-sampling.top_k]
        ids = ids[scores[ids] >= lowest]
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    weights = np.exp(scores[ids] - scores[ids[0]])
    before = np.cumsum(weights)
    inside = before[:-1] < sampling.top_p * before[-1]
    count = 1 + int(inside.argmin() if not inside.all() else len(inside))
    weights = weights[:count]
    count = int(np.count_nonzero(weights >= sampling.min_p))
    return ids[:count], weights[:count]


def check_count(name: str, value: object, least: int) -> None:
    """Refuse a value that is no whole number of at least `least`.

    Raises:
        InputError: Naming the value.

    Example:
        >>> check_count("top_k", 50, least=0)
        >>> check_count("top_k", -1, least=0)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: top_k is -1. Give a whole number of at least 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise InputError(f"{name} is {shown(value)}.", f"Give a whole number of at least {least}.")


def _check_number(name: str, value: object, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= value <= most:
        raise InputError(f"{name} is {shown(value)}.", f"Give a number from 0 to {most:g}.")
