"""Answers by greedy generation, and how many of them are right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qe_edge.models.family import ModelFamily, Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.validate.schema import Accuracy
from qe_edge.validate.subjects import Subject

BATCH = 25  # samples per forward pass
SPARE_TOKENS = 4  # room beyond the longest reference answer, so that a longer answer is not cut to a right one


@dataclass(frozen=True)
class Reader:
    """What encodes the questions, the same for all models.

    Attributes:
        family: The original's family.
        processor: Its tokenizer and image processor.
    """

    family: ModelFamily
    processor: Any


def batches(samples: Sequence[Sample], size: int = BATCH) -> list[Sequence[Sample]]:
    """Cut samples into batches."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def answer_length(source: Reader | LoadedModel, samples: Sequence[Sample]) -> int:
    """Tokens to generate: the longest reference answer and a little more."""
    encode, processor = source.family.encode, source.processor
    masks = (encode(processor, part, answers=True).answer_mask for part in batches(samples))
    # the run of True at a row's end; earlier answers of a conversation stand before its last question
    return max(int(mask[:, ::-1].argmin(axis=1).max()) for mask in masks) + SPARE_TOKENS


def answer_all(
    subject: Subject,
    source: Reader | LoadedModel,
    samples: Sequence[Sample],
    max_new_tokens: int,
    done: Callable[[int], None],
    size: int = BATCH,
) -> list[str]:
    """The subject's answers as text.

    Args:
        subject: The model.
        source: Whose family and processor encode the questions, the same for all subjects.
        samples: The questions.
        max_new_tokens: Most tokens of an answer.
        done: Called with the number of samples of every finished batch.
        size: Samples of a batch.
    """
    tokenizer = source.processor.tokenizer
    texts: list[str] = []
    for part in batches(samples, size):
        encoded = source.family.encode(source.processor, part)
        rows = subject.generate_ids(encoded, max_new_tokens)
        texts.extend(tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in rows)
        done(len(part))
    return texts


def is_right(answer: str, reference: str) -> bool:
    """Whether an answer is the reference, but for case, surrounding space and a final full stop."""
    return _normal(answer) == _normal(reference)


def is_right_for(sample: Sample, answer: str) -> bool:
    """Whether an answer is one of a sample's right answers."""
    return any(is_right(answer, reference) for reference in sample.references)


def score(samples: Sequence[Sample], answers: Sequence[str]) -> Accuracy:
    """Right answers by kind of question."""
    total: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for sample, answer in zip(samples, answers, strict=True):
        total[sample.kind] += 1
        correct[sample.kind] += is_right_for(sample, answer)
    return Accuracy(correct=dict(correct), total=dict(total))


def _normal(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()
