"""Brings pictures and frames into the order of their tokens: a template may show pictures before videos."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def in_token_order(
    films: np.ndarray, pictures: Iterable[T], frames: Iterable[T], tokens: Callable[[T], int]
) -> Iterator[tuple[bool, list[T]]]:
    """Runs of pictures, or of frames, that follow each other.

    Args:
        films: Bool `[tokens]`, for every token of a picture or video whether it is a video's.
        pictures: In order, or their parts.
        frames: Of all videos, in order, or their parts.
        tokens: How many tokens one of these has.

    Yields:
        Whether they are frames, and the run.

    Example:
        >>> films = np.repeat([True, False, True], [4, 5, 2])
        >>> list(in_token_order(films, ["photo"], ["a", "b", "c"], lambda shown: len(shown) if shown == "photo" else 2))
        [(True, ['a', 'b']), (False, ['photo']), (True, ['c'])]
    """
    waiting = {False: iter(pictures), True: iter(frames)}
    for film, group in itertools.groupby(films.tolist()):
        run: list[T] = []
        left = len(list(group))
        while left > 0:
            run.append(next(waiting[film]))
            left -= tokens(run[-1])
        yield film, run
