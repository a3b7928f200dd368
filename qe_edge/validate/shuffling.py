"""The shuffled-images control: every question gets another one's picture, which shows how much guessing gains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qe_edge.models.family import Sample
from qe_edge.models.videos import Video


def shuffle_pictures(samples: Sequence[Sample], seed: int = 0) -> list[Sample] | None:
    """Exchange the pictures so that no question keeps its own; text-only samples stay as they are.

    Questions are sorted into sets that share their pictures, and the sets are put in a random order. Then every picture
    moves on by the size of the largest set. A question with several pictures gets the pictures of a question with
    equally many, and equally many videos. The result depends on the seed alone.

    Returns:
        The samples in their order with other pictures, or None if one picture belongs to more than half of them (then
        there is no such exchange).

    Example:
        >>> samples = [Sample(Path(f"{name}.png"), f"what is {name}?") for name in "abc"]
        >>> [(sample.question, str(sample.image)) for sample in shuffle_pictures(samples)]
        [('what is a?', 'b.png'), ('what is b?', 'c.png'), ('what is c?', 'a.png')]
    """
    by_count: dict[tuple[int, int], dict[Hashable, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, sample in enumerate(samples):
        if sample.media:
            by_count[len(sample.pictures), len(sample.videos)][_identity(sample)].append(index)
    shuffled = list(samples)
    for sets in by_count.values():
        order = list(sets.values())
        count = sum(len(members) for members in order)
        largest = max(len(members) for members in order)
        if 2 * largest > count:
            return None
        random = np.random.default_rng(seed).permutation(len(order))
        line = [index for number in random for index in order[number]]
        for position, index in enumerate(line):
            shuffled[index] = replace(samples[index], image=samples[line[(position + largest) % count]].image)
    return shuffled if by_count else None


def _identity(sample: Sample) -> Hashable:
    return tuple(
        shown.identity if isinstance(shown, Video) else shown if isinstance(shown, Path) else id(shown)
        for shown in sample.media
    )
