"""Answers and first-token divergence of a real model, quantized by several methods (language linears only).

    python benchmarks/assemble_real_vlm.py out/real
    python benchmarks/compare_methods.py out/real [--runs rtn:w4a8 qe:w4a8 ...] [--samples 128]

Every row starts from the same float32 model. An answer counts when greedy decoding gives exactly the reference answer
and the end of turn; that is read off one teacher-forced pass. KL is that of the first answer token, original to
quantized, in nats, the mean over all questions. The last rows are the original, and the original with every picture
exchanged for another one: what is answered blind.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qe_edge.calibration.sources import load_evaluation
from qe_edge.errors import QEError, RecipeError
from qe_edge.linear import quantized_linears
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.quantizer import quantize
from qe_edge.recipe import Recipe, make_recipe

BATCH = 20
RUNS = ("rtn:w4a8", "qe:w4a8", "rtn:w4a6", "qe:w4a6")


@dataclass(frozen=True)
class Answers:
    """What a model says to every question.

    Attributes:
        right: Whether greedy decoding gives the reference answer.
        first: `[questions, vocabulary]` log-probabilities of the first answer token.
    """

    right: list[bool]
    first: Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table; shares in percent, KL in nats."""

    run: str
    open: float
    yesno: float
    kl: float
    seconds: float


def ask(loaded: LoadedModel, samples: Sequence[Sample]) -> Answers:
    """Put every question, teacher-forced."""
    right: list[bool] = []
    first: list[Tensor] = []
    for start in range(0, len(samples), BATCH):
        encoded = loaded.family.encode(loaded.processor, samples[start : start + BATCH], answers=True)
        with torch.no_grad():
            logits = loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False).logits
        for row, answer in enumerate(encoded.answer_mask):
            places = np.flatnonzero(answer)
            said = logits[row, places - 1].argmax(-1).numpy()
            right.append(bool((said == encoded.input_ids[row, places]).all()))
            first.append(logits[row, places[0] - 1].float().log_softmax(-1))
    return Answers(right, torch.stack(first))


def score(run: str, samples: Sequence[Sample], answers: Answers, original: Answers, seconds: float) -> Row:
    """Compare with the original."""
    kinds = np.array([sample.kind for sample in samples])
    right = np.array(answers.right)
    divergence = (original.first.exp() * (original.first - answers.first)).sum(-1).mean()
    opened, yesno = (100 * float(right[kinds == kind].mean()) for kind in ("open", "yesno"))
    return Row(run, opened, yesno, float(divergence), seconds)


def exchange_pictures(samples: Sequence[Sample]) -> list[Sample]:
    """Every question with the picture of another one."""
    return [replace(sample, image=samples[index - 1].image) for index, sample in enumerate(samples)]


def recipe_of(run: str, samples: int) -> Recipe:
    """The recipe that a run such as "qe:w4a8" names.

    Raises:
        QEError: If there is no such method or scheme.
    """
    method, _, scheme = run.partition(":")
    if not scheme:
        raise RecipeError(f"'{run}' is no run.", "Write method:scheme, for example qe:w4a8.")
    return make_recipe(method=method, scheme=scheme, calibration={"samples": samples})


def compare(folder: Path, data: Path, runs: Sequence[str], calibration: int) -> list[Row]:
    """One row per run, then the original and the exchanged pictures."""
    recipes = {run: recipe_of(run, calibration) for run in runs}
    samples = load_evaluation(str(data / "evaluation.jsonl"))
    loaded = load_model(str(folder), torch.float32)
    original = ask(loaded, samples)
    rows = [
        score("original", samples, original, original, 0.0),
        score("pictures exchanged", samples, ask(loaded, exchange_pictures(samples)), original, 0.0),
    ]
    for run, recipe in recipes.items():
        loaded = load_model(str(folder), torch.float32)
        started = time.perf_counter()
        loaded, _ = quantize(loaded, recipe, str(data / "calibration.jsonl"))
        seconds = time.perf_counter() - started
        for layer in quantized_linears(loaded.model).values():
            layer.keep_decoded(True)
        rows.append(score(run, samples, ask(loaded, samples), original, seconds))
        print(rows[-1], file=sys.stderr)
    return rows[2:] + rows[:2]


def main() -> None:
    """Print the table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder that assemble_real_vlm.py wrote")
    parser.add_argument("--data", type=Path, help="folder of the questions (default: MODEL/data)")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="METHOD:SCHEME", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        rows = compare(arguments.model, arguments.data or arguments.model / "data", arguments.runs, arguments.samples)
    except QEError as error:
        sys.exit(str(error))
    print(f"{'run':<20} {'open %':>7} {'yes/no %':>9} {'KL':>8} {'seconds':>8}")
    for row in rows:
        print(f"{row.run:<20} {row.open:>7.1f} {row.yesno:>9.1f} {row.kl:>8.4f} {row.seconds:>8.0f}")
    print(
        json.dumps({"script": "compare_methods", "samples": arguments.samples, "rows": [asdict(row) for row in rows]})
    )


if __name__ == "__main__":
    main()
