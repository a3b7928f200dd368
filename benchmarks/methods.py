r"""Accuracy and divergence of every method beside its bits per weight, on one model.

    python benchmarks/methods.py demo --schemes w4a8 w3a16 --methods rtn gptq qe@4.25 qe qe:paper
    python benchmarks/assemble_real_vlm.py out/real
    python benchmarks/methods.py out/real --methods rtn awq gptq aser qe --samples 128 \
        --calibration out/real/data/calibration.jsonl --evaluation out/real/data/evaluation.jsonl

One row for the original, one for it with exchanged pictures, and for every scheme one per method; unless asked for
others those are rounding (RTN), Quant Experts with our defaults, and Quant Experts as in the paper. Every row starts
from the same original; the measures are those of `qe-edge validate`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from qe_edge.budget.accounting import count_bits
from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.numerics.schemes import SCHEMES
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.report.wording import percent, significant
from qe_edge.system.errors import QEError
from qe_edge.validate.answers import answer_all, answer_length, score
from qe_edge.validate.comparison import Comparison
from qe_edge.validate.schema import Accuracy
from qe_edge.validate.shuffling import shuffle_pictures
from qe_edge.validate.subjects import TorchSubject, block_groups, in_float32

DEFAULT_METHODS = ("rtn", "qe", "qe:paper")
HEADINGS = ("row", "KL answer", "KL text", "top-1", "open", "yes/no", "stored", "read", "seconds")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: Method, preset and scheme.
        kl_answer: Mean KL(original || this) in nats on answer tokens.
        kl_text: The same on all text tokens.
        top1: Share of text positions with the original's most likely token.
        open: Accuracy on open questions.
        yesno: Accuracy on yes/no questions.
        stored: Stored bits per weight, everything included; None for the original.
        read: Bits per weight that one decoded token reads.
        seconds: Time to quantize.
    """

    name: str
    kl_answer: float | None = None
    kl_text: float | None = None
    top1: float | None = None
    open: float | None = None
    yesno: float | None = None
    stored: float | None = None
    read: float | None = None
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text."""
        return (
            self.name, significant(self.kl_answer), significant(self.kl_text), percent(self.top1), percent(self.open),
            percent(self.yesno), significant(self.stored), significant(self.read), significant(self.seconds),
        )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes:
        reference: The model as given.
        original: It in float32.
        samples: Held-out questions.
        length: Most tokens of an answer.
        modules: Modules to quantize.
        calibration: Source of calibration samples.
        count: Number of them.
    """

    reference: str
    original: LoadedModel
    samples: Sequence[Sample]
    length: int
    modules: tuple[str, ...]
    calibration: str
    count: int

    def accuracy(self, loaded: LoadedModel, samples: Sequence[Sample]) -> Accuracy:
        """Accuracy by greedy generation."""
        answers = answer_all(TorchSubject(loaded), self.original, samples, self.length, lambda _: None)
        return score(samples, answers)


def recipes(setting: Setting, methods: Sequence[str], schemes: Sequence[str]) -> list[Recipe]:
    """One recipe per scheme and method, all checked before any of them runs.

    Raises:
        QEError: If there is no such method or preset.
    """
    wanted = []
    for scheme in schemes:
        for text in methods:
            named, _, bits = text.partition("@")
            method, _, preset = named.partition(":")
            keys: dict[str, object] = {"budget": {"bits": bits}} if bits else {}
            recipe = make_recipe(
                method=method,
                preset=preset or "default",
                scheme=scheme,
                modules=setting.modules,
                calibration={"source": setting.calibration, "samples": setting.count},
                **keys,
            )
            wanted.append(recipe)
    return wanted


def measure(setting: Setting, recipe: Recipe) -> Row:
    """Quantize one way and compare with the original."""
    started = time.perf_counter()
    quantized, _ = quantize(setting.reference, recipe)
    seconds = time.perf_counter() - started
    bits = count_bits(quantized.model, block_groups(quantized)).total
    in_float32(quantized)
    comparison = Comparison(setting.original, quantized, None)
    comparison.measure_heldout(setting.samples, lambda _: None)
    distance = comparison.distances["quantized"]
    accuracy = setting.accuracy(quantized, setting.samples)
    return Row(
        name=f"{recipe.method} {recipe.scheme}"
        + ("" if recipe.preset == "default" else f" ({recipe.preset})")
        + (f", {recipe.budget.bits:g} bits" if recipe.budget.bits else ""),
        kl_answer=distance.answer.mean_divergence(),
        kl_text=distance.text.mean_divergence(),
        top1=distance.text.agreement(),
        open=accuracy.share("open"),
        yesno=accuracy.share("yesno"),
        stored=bits.stored_bits,
        read=bits.read_bits,
        seconds=seconds,
    )


def originals(setting: Setting) -> list[Row]:
    """The original, and the original with every picture exchanged for another one."""
    rows = []
    for name, samples in (("original", setting.samples), ("original, shuffled", shuffle_pictures(setting.samples))):
        if samples is not None:
            accuracy = setting.accuracy(setting.original, samples)
            rows.append(Row(name, open=accuracy.share("open"), yesno=accuracy.share("yesno")))
    return rows


def main() -> int:
    """Print the table row by row, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="'demo', a folder or a hub id")
    parser.add_argument(
        "--methods", nargs="+", default=DEFAULT_METHODS, metavar="NAME[:PRESET][@BITS]", help="default: %(default)s"
    )
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["w4a8"])
    parser.add_argument("--modules", nargs="+", default=["language"])
    parser.add_argument("--calibration", default="demo", help="source of calibration samples")
    parser.add_argument("--samples", type=int, default=64, help="number of calibration samples")
    parser.add_argument("--evaluation", default="demo", help="source of held-out questions")
    parser.add_argument("--limit", type=int, help="use only the first questions")
    parser.add_argument("--threads", type=int, help="threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        samples = load_evaluation(options.evaluation)[: options.limit]
        original = in_float32(load_model(options.model))
        setting = Setting(
            options.model, original, samples, answer_length(original, samples), tuple(options.modules),
            options.calibration, options.samples,
        )  # fmt: skip
        planned = recipes(setting, options.methods, options.schemes)
        rows = originals(setting)
        for cells in (HEADINGS, *(row.cells() for row in rows)):
            show(cells)
        for recipe in planned:
            rows.append(measure(setting, recipe))
            show(rows[-1].cells())
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"model": options.model, "questions": len(samples), "rows": [asdict(row) for row in rows]}))
    return 0


def show(cells: Sequence[str]) -> None:
    """One line of the table."""
    print(f"{cells[0]:22}" + "".join(f"{cell:>13}" for cell in cells[1:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
