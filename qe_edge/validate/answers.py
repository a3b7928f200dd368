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
    """The family and the processor that encode the questions for all models.

    Attributes:
        family: The original's family.
        processor: Its tokenizer and image processor.
    """

    family: ModelFamily
    processor: Any


def batches(samples: Sequence[Sample], size: int = BATCH) -> list[Sequence[Sample]]:
    """Cut samples into batches.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation
        >>> [len(part) for part in batches(load_evaluation("demo")[:60], size=25)]
        [25, 25, 10]
    """
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def answer_length(source: Reader | LoadedModel, samples: Sequence[Sample]) -> int:
    """Return how many tokens to generate: as many as the longest reference answer has, and four more.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation
        >>> from qe_edge.models.loading import load_model
        >>> loaded, samples = load_model("demo"), load_evaluation("demo")[:5]
        >>> [sample.answer for sample in samples]
        ['yes', 'rectangle', 'yes', 'circle', 'brown']
        >>> answer_length(loaded, samples)
        6
    """
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
        source: Holds the family and the processor that encode the questions.
        samples: The questions.
        max_new_tokens: The largest number of tokens of an answer.
        done: Called with the number of samples of every finished batch.
        size: Samples of a batch.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation
        >>> from qe_edge.validate.subjects import TorchSubject, load_float32
        >>> loaded, samples = load_float32("demo"), load_evaluation("demo")[:3]
        >>> answer_all(TorchSubject(loaded), loaded, samples, 8, done=lambda count: print(f"{count} answered"))
        3 answered
        ['yes', 'rectangle', 'yes']
        >>> [sample.answer for sample in samples]
        ['yes', 'rectangle', 'yes']
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
    """Whether an answer equals the reference; case, surrounding space and a final full stop do not count.

    Example:
        >>> is_right(" Red.", "red"), is_right("dark red", "red")
        (True, False)
    """
    return _normal(answer) == _normal(reference)


def is_right_for(sample: Sample, answer: str) -> bool:
    """Whether an answer is one of a sample's right answers.

    Example:
        >>> is_right_for(Sample("a.png", "what color is it?", answers=("teal", "green")), "Green.")
        True
    """
    return any(is_right(answer, reference) for reference in sample.references)


def score(samples: Sequence[Sample], answers: Sequence[str]) -> Accuracy:
    """Right answers by kind of question.

    Example:
        >>> asked = [Sample(None, "is it red?", "yes", kind="yesno"), Sample(None, "which color?", "red", kind="open")]
        >>> accuracy = score(asked, ["no", "Red."])
        >>> accuracy.share("open"), accuracy.share("yesno"), accuracy.share()
        (1.0, 0.0, 0.5)
    """
    total: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for sample, answer in zip(samples, answers, strict=True):
        total[sample.kind] += 1
        correct[sample.kind] += is_right_for(sample, answer)
    return Accuracy(correct=dict(correct), total=dict(total))


def _normal(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()
