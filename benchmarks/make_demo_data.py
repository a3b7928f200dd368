"""Draw the demo's calibration and evaluation questions from easy-VQA (`pip install easy-vqa==1.0`).

    python benchmarks/make_demo_data.py [--output qe_edge/demo/data]

Calibration takes training pictures, evaluation takes test pictures, and every picture carries one question. Within each
kind of question the answers are as even as the data allows, so that always giving the commonest answer gains nothing.
(The wording of a yes/no question still hints at its answer, as it does in all of easy-VQA.) The draw has a fixed seed
and pictures are copied as they are: a second run writes the same bytes.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import easy_vqa

SEED = 0
SHAPES = frozenset({"circle", "rectangle", "triangle"})
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "qe_edge" / "demo" / "data"


@dataclass(frozen=True, order=True)
class Cell:
    """A group of questions that is drawn to a quota of its own."""

    kind: str
    """`open` or `yesno`."""
    topic: str
    """What the question is about: `color` or `shape`."""


@dataclass(frozen=True)
class Question:
    """One easy-VQA question."""

    text: str
    answer: str
    picture: int
    """easy-VQA's number of the picture, unique within its train or test part."""

    @property
    def cell(self) -> Cell:
        """The group that the question belongs to."""
        if self.answer in {"yes", "no"}:
            names_shape = any(shape in self.text for shape in SHAPES)
            return Cell("yesno", "shape" if names_shape else "color")
        return Cell("open", "shape" if self.answer in SHAPES else "color")


CALIBRATION = dict.fromkeys((Cell(kind, topic) for kind in ("open", "yesno") for topic in ("color", "shape")), 16)
EVALUATION = dict.fromkeys(CALIBRATION, 50)


def draw(questions: list[Question], quotas: Mapping[Cell, int], seed: int) -> list[Question]:
    """Draw `quotas[cell]` questions of every cell, answers in turn and no picture twice, in a random order.

    Only `random.Random.random` is used, whose sequence Python keeps the same from version to version.

    Raises:
        ValueError: A cell has too few questions on pictures that are still free.
    """
    rng = random.Random(seed)
    by_answer: dict[Cell, dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in sorted(questions, key=lambda _: rng.random()):
        by_answer[question.cell][question.answer].append(question)

    drawn: list[Question] = []
    used: set[int] = set()
    for cell, quota in quotas.items():
        for question in _in_turn(by_answer[cell], used, quota):
            used.add(question.picture)
            drawn.append(question)
    if len(drawn) < sum(quotas.values()):
        raise ValueError(f"Only {len(drawn)} questions for quotas {dict(quotas)}. Lower the quotas.")
    return sorted(drawn, key=lambda _: rng.random())


def _in_turn(by_answer: Mapping[str, list[Question]], used: set[int], quota: int) -> Iterator[Question]:
    """Up to `quota` questions, one answer after the other; `used` may grow between two of them."""
    waiting = {answer: iter(by_answer[answer]) for answer in sorted(by_answer)}
    while waiting and quota > 0:
        for answer, candidates in list(waiting.items())[:quota]:
            question = next((q for q in candidates if q.picture not in used), None)
            if question is None:
                del waiting[answer]
            else:
                quota -= 1
                yield question


def write_part(name: str, questions: list[Question], pictures: Mapping[int, str], output: Path) -> None:
    """Write `name.jsonl` and the pictures `images/name/0001.png`, ... that it points to."""
    folder = output / "images" / name
    folder.mkdir(parents=True)
    lines = []
    for number, question in enumerate(questions, start=1):
        picture = folder / f"{number:04d}.png"
        shutil.copyfile(pictures[question.picture], picture)
        record = {
            "image": picture.relative_to(output).as_posix(),
            "question": question.text,
            "answer": question.answer,
            "kind": question.cell.kind,
            "topic": question.cell.topic,
        }
        lines.append(json.dumps(record) + "\n")
    (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Draw both parts, put them in place of the old ones, and print what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to write (default: %(default)s)")
    output: Path = parser.parse_args().output

    training = [Question(*row) for row in zip(*easy_vqa.get_train_questions(), strict=True)]
    held_out = [Question(*row) for row in zip(*easy_vqa.get_test_questions(), strict=True)]
    parts = {
        "calibration": (draw(training, CALIBRATION, SEED), easy_vqa.get_train_image_paths()),
        "evaluation": (draw(held_out, EVALUATION, SEED), easy_vqa.get_test_image_paths()),
    }

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        fresh = Path(scratch) / "data"
        for name, (questions, pictures) in parts.items():
            write_part(name, questions, pictures, fresh)
        if output.exists():
            output.rename(Path(scratch) / "old")
        fresh.rename(output)

    print(f"{'part':<12} {'kind':<6} {'topic':<6} {'number':>6}  answers")
    counts: dict[str, dict[str, int]] = {}
    for name, (questions, _) in parts.items():
        cells = Counter(question.cell for question in questions)
        counts[name] = {f"{cell.kind}/{cell.topic}": number for cell, number in sorted(cells.items())}
        for cell, number in sorted(cells.items()):
            answers = Counter(question.answer for question in questions if question.cell == cell)
            listed = ", ".join(f"{answer} {times}" for answer, times in sorted(answers.items()))
            print(f"{name:<12} {cell.kind:<6} {cell.topic:<6} {number:>6}  {listed}")
    print(json.dumps({"script": "make_demo_data", "seed": SEED, **counts}))


if __name__ == "__main__":
    main()
