"""No question keeps its picture, and nothing else about it changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.validate.shuffling import shuffle_pictures


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=30), st.integers(0, 3))
def test_no_picture_stays(numbers: list[int | None], seed: int) -> None:
    samples = [
        Sample(None if number is None else Path(f"{number}.png"), f"question {index}", "yes")
        for index, number in enumerate(numbers)
    ]
    shuffled = shuffle_pictures(samples, seed)
    used = Counter(number for number in numbers if number is not None)
    if not used or 2 * max(used.values()) > used.total():
        assert shuffled is None
        return
    assert shuffled is not None
    for before, after in zip(samples, shuffled, strict=True):
        assert before.image is None or after.image != before.image
        assert (before.image is None) == (after.image is None)
        assert (before.question, before.answer) == (after.question, after.answer)
    assert Counter(sample.image for sample in shuffled) == Counter(sample.image for sample in samples)


def test_the_demo_is_shuffled_the_same_way_every_time() -> None:
    samples = load_evaluation("demo")
    first, second = shuffle_pictures(samples), shuffle_pictures(samples)
    assert first == second
    assert first is not None
    assert all(one.image != other.image for one, other in zip(samples, first, strict=True))


def test_several_pictures_are_exchanged_for_as_many() -> None:
    pairs = [Sample([Path(f"{number}a.png"), Path(f"{number}b.png")], "which?", marks=(2, 3)) for number in range(4)]
    single = [Sample(Path(f"{number}.png"), "what?") for number in range(3)]
    shuffled = shuffle_pictures([*pairs, *single, Sample(None, "why?")])
    assert shuffled is not None
    for before, after in zip([*pairs, *single], shuffled, strict=False):
        assert len(after.pictures) == len(before.pictures)
        assert not set(after.pictures) & set(before.pictures)
        assert after.marks == before.marks
    assert shuffle_pictures([*single, pairs[0]]) is None  # nobody can give it another pair
