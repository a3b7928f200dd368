r"""Error against bytes: every method on the three real models, and Quant Experts inside budgets of bits.

    python benchmarks/assemble_real_models.py smollm2 out/smollm2
    python benchmarks/assemble_real_models.py dinov2 out/dinov2
    python benchmarks/assemble_real_vlm.py out/vlm
    python benchmarks/accuracy_per_byte.py out --results out/accuracy.json --plot out/accuracy.png

Finished rows are kept in the results file, so a stopped run goes on where it was; `results/accuracy_per_byte.json`
beside this script holds those of README's table (32 calibration samples, DINOv2 64; null is what was not kept of older
runs). All methods see the same calibration samples, number grids and modules. Bits count everything that belongs to a
layer: packed codes, scales, adapters, router; and the matrix that a rotated model with a tied head needs. The last
table names, for every budget, the best method of others that fits it, and ours.

    python benchmarks/accuracy_per_byte.py out --results out/options.json --methods loaq --budgets 4.25 \
        --variants match polish=4 match,polish=4 --seeds 0 1 2

Variants are options of ours, each beside its budget without them. Other seeds draw other calibration samples. The table
of variants has the ratio of their error to the budget's, its median over seeds, and the interval that holds it in 95 %
of bootstrap draws over seeds and held-out samples (`benchmarks/intervals.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from intervals import ratio_interval
from real_models import REAL_MODELS, RealModel

from qe_edge.budget.accounting import count_bits
from qe_edge.budget.model import offers_from_json, offers_to_json
from qe_edge.quantization.job import make_job
from qe_edge.quantization.quantizer import quantize
from qe_edge.quantization.run_record import current_environment
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.system.atomic import atomic_file
from qe_edge.system.device import choose_device
from qe_edge.system.errors import QEError, RecipeError
from qe_edge.validate.subjects import block_groups

SCHEMES = ("w4a8", "w4a6", "w3a16")
BUDGETS = (3.5, 4.25, 4.5, 5.0)
READ_BUDGET = 4.5  # limits only what a token reads, with routed experts and without
ERRORS = {"smollm2": "kl", "vlm": "kl", "dinov2": "cosine_loss"}  # what is compared, 0 for the original itself
TYPICAL = "kl_median"  # compared too where it is measured: a mean over answers may be that of a few
OTHERS = (
    "rtn", "smoothquant", "awq", "mbq", "gptq", "omniquant", "quarot", "lorc", "lqer", "svdquant", "aser", "aser:plain",
    "aser:memory", "loaq", "serq", "spqr", "atom", "quip", "quipsharp", "autoround", "masquant", "vlmq", "bwa",
)  # fmt: skip
PAPER = "qe:paper"
STATIC = "static"  # our budget again, but without routed experts
AS_IT_IS = "ours not rotated"  # the language model as it is
WITH = "ours with "  # our budgets with other options
ACTIVATIONS_ONLY = ("smoothquant",)  # nothing to smooth for 16-bit activations
LANGUAGE_ONLY = ("mbq", "quarot", "masquant", "vlmq")  # need a loss, or a stream of residuals between RMSNorms
LATER = ("match", "polish")  # options that play no part before a budget is spent
ASER_MEMORY = {"rank": 288}  # r_s + N_r r_r of the paper: its memory, in one static correction


@dataclass(frozen=True)
class Row:
    """One measured quantization; None is what was not kept of older ones.

    Attributes:
        model: Key in `REAL_MODELS`.
        scheme: Number grids.
        name: Method and preset, or our budget.
        stored: Bits per weight of the checkpoint's quantized layers.
        read: Bits per weight that one token reads.
        error: The model's error measure.
        measures: All measures by name.
        seconds: Time to quantize.
        routed: Share of the weights in layers with routed experts.
        seed: Seed of the calibration samples.
        commit: Commit that measured it.
        losses: The error on every held-out sample.
    """

    model: str
    scheme: str
    name: str
    stored: float
    read: float | None
    error: float
    measures: dict[str, float]
    seconds: float | None
    routed: float | None
    seed: int = 0
    commit: str | None = None
    losses: list[float] | None = None

    @property
    def ours(self) -> bool:
        """Whether a budget of ours made it."""
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Job:
    """One row to measure: its name, and the recipe's keys."""

    name: str
    keys: dict[str, Any]


def jobs(
    model: str,
    scheme: str,
    methods: Sequence[str],
    budgets: Sequence[float] = BUDGETS,
    variants: Sequence[Mapping[str, Any]] = (),
    *,
    all_of_ours: bool = True,
) -> Iterator[Job]:
    """Every row of one model and scheme: methods of others, our budgets, and our budgets with other options."""
    for name in methods:
        method, _, preset = name.partition(":")
        if (method in ACTIVATIONS_ONLY and scheme.endswith("a16")) or (method in LANGUAGE_ONLY and model == "dinov2"):
            continue
        if preset == "memory":
            yield Job(name, {"method": method, "options": ASER_MEMORY})
        else:
            yield Job(name, {"method": method, "preset": preset or "default"})
    for bits in budgets:
        yield Job(f"ours, {bits:g} stored", {"method": "qe", "budget": {"bits": bits}})
        for options in variants:
            name = f"{WITH}{variant_name(options)}, {bits:g} stored"
            yield Job(name, {"method": "qe", "options": dict(options), "budget": {"bits": bits}})
    if not all_of_ours:
        return
    for name in ("ours", STATIC):
        yield Job(f"{name}, {READ_BUDGET:g} read", {"method": "qe", "budget": {"read_bits": READ_BUDGET}})
    for bits in budgets if model != "dinov2" else ():
        keys = {"method": "qe", "options": {"rotate": False}, "budget": {"bits": bits}}
        yield Job(f"{AS_IT_IS}, {bits:g} stored", keys)


def variant_of(text: str) -> dict[str, Any]:
    """Options written as `name`, for true, or `name=value`, with commas between them."""
    pairs = (part.partition("=") for part in text.split(","))
    return {name: json.loads(value) if value else True for name, _, value in pairs}


def variant_name(options: Mapping[str, Any]) -> str:
    """Options as they are written."""
    return ",".join(name if value is True else f"{name}={json.dumps(value)}" for name, value in options.items())


def measure(real: RealModel, recipe: Recipe, name: str, offers: Path, seed: int = 0) -> Row:
    """Quantize one way and measure; what budgets measure first is kept in `offers` for the next one."""
    started = time.perf_counter()
    static = name.startswith(STATIC)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary) / "run"
        begin(work, real, recipe, offers, static=static)
        quantized, _ = quantize(real.folder, recipe, real.calibration, work=work, resume=True)
        seconds = time.perf_counter() - started
        if recipe.budget and not static:
            offers.mkdir(parents=True, exist_ok=True)
            for path in (*work.glob("*.offers.json"), *work.glob("gradients.safetensors")):
                shutil.copy(path, offers)
    counted = count_bits(quantized.model, block_groups(quantized))
    routed = sum(layer.bits.weights for layer in counted.layers if layer.bits.router)
    bits = counted.total
    measures, losses = real.judge(quantized)
    error = measures[ERRORS[real.name]]
    share = routed / bits.weights
    return Row(
        real.name, recipe.scheme, name, bits.stored_bits, bits.read_bits, error, measures, seconds, share, seed,
        commit(), [float(f"{loss:.4g}") for loss in losses],
    )  # fmt: skip


def commit() -> str:
    """The commit of this clone, with `-dirty` where files have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def begin(work: Path, real: RealModel, recipe: Recipe, offers: Path, *, static: bool) -> None:
    """An unfinished run in `work` that has measured what `offers` holds."""
    run = make_job(real.folder, recipe, real.calibration).record(current_environment(str(choose_device("auto"))))
    folder = WorkFolder.open(work, run, resume=False)
    for path in sorted(offers.glob("*")):
        folder.expect(path.name)
        shutil.copy(path, work)
        if static and path.name.endswith(".offers.json"):
            (work / path.name).write_text(_without_experts(path.read_text(encoding="utf-8")), encoding="utf-8")
        folder.wrote(path.name)


def _without_experts(text: str) -> str:
    """Offers without candidates that route."""
    offers = offers_from_json(text)
    static = {
        name: replace(offer, candidates=[one for one in offer.candidates if not one.choice.adapters.experts])
        for name, offer in offers.items()
    }
    return offers_to_json(static)


def run(options: argparse.Namespace) -> list[Row]:
    """Measure all rows that the results file lacks."""
    rows = [Row(**row) for row in _read(options.results)]
    for name, seed in product(options.models, options.seeds):
        real: RealModel | None = None
        for scheme in options.schemes:
            for job in jobs(
                name, scheme, options.methods, options.budgets, options.variants, all_of_ours=not options.variants
            ):
                if any((row.model, row.scheme, row.name, row.seed) == (name, scheme, job.name, seed) for row in rows):
                    continue
                if real is None:
                    real = REAL_MODELS[name](options.folder / name, options.samples, options.questions, seed)
                    print(name, "original", {key: f"{value:.4g}" for key, value in real.original.items()}, flush=True)
                try:
                    recipe = make_recipe(scheme=scheme, modules=real.modules, **job.keys)
                    row = measure(real, recipe, job.name, _offers(options, name, scheme, seed, job), seed)
                except RecipeError as error:  # a budget below groups of 64 and zero points, or a method without 3 bits
                    print(f"{name:8} {scheme:6} {job.name:18} {error.args[0]}", flush=True)
                    continue
                rows.append(row)
                _write(options.results, rows)
                print(
                    f"{name:8} {scheme:6} {job.name:18} {row.stored:6.3f} {row.read:6.3f} {row.error:.3e} "
                    f"{row.seconds:6.1f} s  seed {seed}", flush=True,
                )  # fmt: skip
    return rows


def _offers(options: argparse.Namespace, model: str, scheme: str, seed: int, job: Job) -> Path:
    """Folder of what is measured before a budget is spent; it depends on samples and options."""
    kept = [scheme, *(["not rotated"] if job.name.startswith(AS_IT_IS) else [])]
    if job.name.startswith(WITH):
        kept.append(variant_name({key: value for key, value in job.keys["options"].items() if key not in LATER}))
    return Path(options.results.with_suffix("") / model / f"seed {seed}" / " ".join(filter(None, kept)))


def _read(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def _write(path: Path, rows: Sequence[Row]) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


def print_variants(rows: Sequence[Row]) -> None:
    """Every variant of ours against the same budget without its options."""
    print("\nvariants: ratio of the error to the budget's own, median over seeds, bootstrap interval of 95 %")
    named = {(row.model, row.scheme, row.seed, row.name): row for row in rows}
    for model, scheme, name in dict.fromkeys((row.model, row.scheme, row.name) for row in rows):
        if not name.startswith(WITH):
            continue
        plain = f"ours, {name.rpartition(', ')[2]}"
        seeds = sorted(row.seed for row in rows if (row.model, row.scheme, row.name) == (model, scheme, name))
        pairs = [(named.get((model, scheme, seed, plain)), named[model, scheme, seed, name]) for seed in seeds]
        known = [(one.losses, other.losses) for one, other in pairs if one and one.losses and other.losses]
        if known:
            found = ratio_interval([other for _, other in known], [one for one, _ in known])
            print(
                f"  {model:8} {scheme:6} {name:40} x {found.ratio:.3f}  {found.low:.3f} to {found.high:.3f}  "
                f"{len(known)} seeds"
            )


def best(rows: Sequence[Row], cost: Callable[[Row], float], limit: float, measure: str) -> Row | None:
    """The row of least error whose cost keeps the limit."""
    inside = (row for row in rows if cost(row) <= limit + 1e-6)
    return min(inside, key=lambda row: row.measures[measure], default=None)


def print_tables(rows: Sequence[Row]) -> None:
    """All rows, then the contest at every budget."""
    groups = list(dict.fromkeys((row.model, row.scheme) for row in rows))
    for model, scheme in groups:
        print(f"\n{model} {scheme}: {'':12} stored   read  {ERRORS[model]:>10}  quantized in")
        for row in rows:
            if (row.model, row.scheme) == (model, scheme):
                others = {key: f"{value:.4g}" for key, value in row.measures.items() if key != ERRORS[model]}
                read, seconds = (math.nan if value is None else value for value in (row.read, row.seconds))
                print(f"  {row.name:22} {row.stored:6.3f} {read:6.3f}  {row.error:10.3e}  {seconds:6.0f} s  {others}")
    print("\nbest of others inside a budget, and ours; ratio of errors")
    for model, scheme in groups:
        group = [row for row in rows if (row.model, row.scheme) == (model, scheme)]
        peers = [row for row in group if not row.ours and not row.name.startswith(STATIC)]
        measures = [ERRORS[model]] + [TYPICAL] * all(TYPICAL in row.measures for row in group)
        for measure, (title, cost), limit in product(measures, (("stored", _stored), ("read", _read_bits)), BUDGETS):
            other = best(peers, cost, limit, measure)
            ours = best([row for row in group if row.ours and not row.name.startswith(WITH)], cost, limit, measure)
            if other and ours:
                theirs, found = other.measures[measure], ours.measures[measure]
                print(
                    f"  {model:8} {scheme:6} {title:6} {limit:5.2f}: {other.name:16} {theirs:.3e}  "
                    f"{ours.name:18} {found:.3e}  x {theirs / max(found, 1e-12):.2f}  {measure}"
                )


def print_markdown(rows: Sequence[Row]) -> None:
    """One table: a line a method with its least stored bits, a column a model and scheme with the errors."""
    columns = list(dict.fromkeys((row.model, row.scheme) for row in rows))
    print("\n| | bits | " + " | ".join(f"{model}, {scheme.upper()}" for model, scheme in columns) + " |")
    print("| --- " * (len(columns) + 2) + "|")
    bits = {name: min(row.stored for row in rows if row.name == name) for name in {row.name for row in rows}}
    for name in sorted(bits, key=lambda name: bits[name]):
        found = {(row.model, row.scheme): row.error for row in rows if row.name == name}
        cells = [f"{found[column]:.2g}" if column in found else "" for column in columns]
        print(f"| {name} | {bits[name]:.2f} | " + " | ".join(cells) + " |")


def _stored(row: Row) -> float:
    return row.stored


def _read_bits(row: Row) -> float:
    return math.inf if row.read is None else row.read


def plot(rows: Sequence[Row], path: Path) -> None:
    """Error against stored bits, one panel a model and scheme."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((row.model, row.scheme) for row in rows))
    columns = min(len(groups), len(SCHEMES))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines), squeeze=False)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_axis_off()
    for axis, (model, scheme) in zip(axes.flat, groups, strict=False):
        group = [row for row in rows if (row.model, row.scheme) == (model, scheme)]
        others = [row for row in group if not row.ours and not row.name.startswith(STATIC)]
        axis.scatter([row.stored for row in others], [row.error for row in others], color="0.45", s=18)
        for row in others:
            axis.annotate(row.name, (row.stored, row.error), fontsize=6, xytext=(3, 2), textcoords="offset points")
        for color, kind in (("tab:blue", "ours"), ("tab:green", AS_IT_IS)):
            inside = [row for row in group if row.name.startswith(f"{kind},") and row.name.endswith("stored")]
            ours = sorted(inside, key=_stored)
            label = kind.replace("ours", "QE-Edge")
            if ours:
                axis.plot([row.stored for row in ours], [row.error for row in ours], "o-", color=color, label=label)
        axis.set(yscale="log", title=f"{model}, {scheme}", xlabel="stored bits per weight", ylabel=ERRORS[model])
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure what is missing, print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the assembled models lie, under their names")
    parser.add_argument("--results", type=Path, required=True, help="JSON file of finished rows")
    parser.add_argument("--plot", type=Path, help="picture to write")
    parser.add_argument("--markdown", action="store_true", help="print all rows as one table in Markdown, too")
    parser.add_argument("--print-only", action="store_true", help="measure nothing, print and draw the finished rows")
    parser.add_argument("--models", nargs="+", choices=list(REAL_MODELS), default=list(REAL_MODELS))
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES))
    parser.add_argument("--methods", nargs="*", default=[*OTHERS, PAPER], help="methods of others, and the paper's")
    parser.add_argument("--budgets", nargs="*", type=float, default=list(BUDGETS), help="stored bits of ours")
    parser.add_argument("--variants", nargs="*", type=variant_of, default=[], help="options of ours, and nothing else")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration samples")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="default: %(default)s")
    options = parser.parse_args()
    try:
        rows = [Row(**row) for row in _read(options.results)] if options.print_only else run(options)
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print_tables([row for row in rows if row.seed == options.seeds[0]])
    print_variants(rows)
    if options.markdown:
        print_markdown(rows)
    if options.plot:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
