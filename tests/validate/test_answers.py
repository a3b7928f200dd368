"""What counts as right, and that answers do not depend on the batch they are asked in."""

from __future__ import annotations

import pytest

from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.validate.answers import answer_all, answer_length, is_right, score
from qe_edge.validate.subjects import TorchSubject


@pytest.mark.parametrize(
    ("answer", "right"), [("blue", True), (" Blue. ", True), ("", False), ("light blue", False), ("blu", False)]
)
def test_right_answers(answer: str, right: bool) -> None:
    assert is_right(answer, "blue") is right


def test_kinds_are_scored_apart() -> None:
    samples = [Sample(None, "?", "yes", "yesno"), Sample(None, "?", "no", "yesno"), Sample(None, "?", "red", "open")]
    accuracy = score(samples, ["yes", "yes", "red"])
    assert accuracy.correct == {"yesno": 1, "open": 1}
    assert accuracy.share("yesno") == 0.5
    assert accuracy.share("open") == 1
    assert accuracy.share() == pytest.approx(2 / 3)
    assert accuracy.share("counting") is None


def test_a_batch_answers_as_its_members_alone(original: LoadedModel, questions: list[Sample]) -> None:
    subject, length, counted = TorchSubject(original), answer_length(original, questions), []
    together = answer_all(subject, original, questions, length, counted.append)
    alone = [answer_all(subject, original, [question], length, lambda _: None)[0] for question in questions]
    assert together == alone
    assert sum(counted) == len(questions)


def test_there_is_room_for_more_than_the_reference(original: LoadedModel, questions: list[Sample]) -> None:
    encoded = original.family.encode(original.processor, questions, answers=True)
    assert answer_length(original, questions) > encoded.answer_mask.sum(1).max()


def test_an_answer_is_right_if_it_is_any_of_the_references() -> None:
    samples = [Sample(None, "?", answers=("teal", "Green"), kind="open"), Sample(None, "?", "teal", kind="open")]
    assert score(samples, ["green.", "green"]).correct == {"open": 1}
    assert score(samples, ["", "TEAL"]).correct == {"open": 1}
