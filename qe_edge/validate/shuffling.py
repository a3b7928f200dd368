"""The shuffled-images control: every question gets the picture of another one, so that blind guessing shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qe_edge.models.family import Sample


def shuffle_pictures(samples: Sequence[Sample], seed: int = 0) -> list[Sample] | None:
    """Exchange the pictures so that no question keeps its own, deterministically; text-only samples stay as they are.

    Questions that share a picture stand side by side in a random order of pictures, and the pictures move on by the
    size of the largest such set.

    Returns:
        The samples in their order with other pictures, or None if one picture belongs to more than half of them (then
        there is no such exchange).
    """
    sets: dict[Hashable, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        if sample.image is not None:
            sets[_identity(sample)].append(index)
    order = list(sets.values())
    count = sum(len(members) for members in order)
    largest = max((len(members) for members in order), default=0)
    if not count or 2 * largest > count:
        return None
    random = np.random.default_rng(seed).permutation(len(order))
    line = [index for number in random for index in order[number]]
    shuffled = list(samples)
    for position, index in enumerate(line):
        shuffled[index] = replace(samples[index], image=samples[line[(position + largest) % count]].image)
    return shuffled


def _identity(sample: Sample) -> Hashable:
    return sample.image if isinstance(sample.image, Path) else id(sample.image)
