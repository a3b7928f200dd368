"""How far `qe-edge predict` is from measurements, and the fit of its timing to half of them.

    python benchmarks/predict_error.py                 # benchmarks/results/h100.json
    python benchmarks/predict_error.py other.json --device h100
    python benchmarks/predict_error.py --fit           # writes qe_edge/predict/timing.yaml and accuracy.json

A measured row is one linear layer at one number of tokens, or the linears of all layers of a model in a row, in a CUDA
graph with cold weights. Rows of "without_clusters" are 1 to 4 tokens by the kernels that chips below 9.0 run. `--fit`
fits to a random half of the linears and of the steps; the limits hold for the others too.
Exit code 1 if a step is off by more than 1.33 times, or more than one of ten linears by more than 1.5 times.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import least_squares

from qe_edge.numerics.schemes import SCHEMES, Scheme, WeightGrid
from qe_edge.predict.shapes import Linear, block_linears, find_model
from qe_edge.predict.tables import Device, device_table, get_device, instruction_table, timing_table
from qe_edge.predict.timing import Timing
from qe_edge.predict.variants import Adapters, Tables, Way, linear_kernels
from qe_edge.predict.work import Kernel

RESULTS = Path(__file__).resolve().parent / "results" / "h100.json"
DATA = Path(sys.modules["qe_edge.predict.tables"].__file__ or "").parent
MODELS = {"2B": "qwen2-vl-2b", "7B": "qwen2-vl-7b"}
NONE = Adapters(0, 0, 0, 2)
RANK_64 = Adapters(64, 0, 0, 0.5)
GROUPED = Scheme("w4a8 g128", WeightGrid(4, 128, symmetric=True), 8)
KINDS: dict[str, tuple[Way, Scheme, Adapters]] = {
    "cuBLAS FP16": ("fp16", SCHEMES["w4a16"], NONE),
    "Edge-LLM W4A16 g128": ("w4a16", SCHEMES["w4a16"], NONE),
    "w4a8": ("plugin", SCHEMES["w4a8"], NONE),
    "w4a8 r64 int4": ("plugin", SCHEMES["w4a8"], RANK_64),
    "w4a8 paper 64+8x32 f16": ("plugin", SCHEMES["w4a8"], Adapters(64, 32, 8, 2)),
    "w4a8 32+8x32 int8": ("plugin", SCHEMES["w4a8"], Adapters(32, 32, 8, 1)),
    "w4a8 g128": ("plugin", GROUPED, NONE),
    "w4a6 r64 int4": ("plugin", SCHEMES["w4a6"], RANK_64),
    "w4a16 g128z": ("plugin", SCHEMES["w4a16"], NONE),
    "w4a16 g128z r64 int4": ("plugin", SCHEMES["w4a16"], RANK_64),
    "w3a8": ("plugin", SCHEMES["w3a8"], NONE),
    "w3a8 r64 int4": ("plugin", SCHEMES["w3a8"], RANK_64),
    "w3a16 g128z": ("plugin", SCHEMES["w3a16"], NONE),
}
STEP_LIMIT, LINEAR_LIMIT, SHARE = 1.33, 1.5, 0.9
STEP_WEIGHT = 8.0  # there are few, and they are what a user asks for


@dataclass(frozen=True)
class Row:
    """A measurement beside its prediction.

    Attributes:
        kind: What ran, as in the file, and whether without clusters.
        what: Widths and tokens, or model and tokens.
        microseconds: Measured.
        predict: Predicted, of a timing.
    """

    kind: str
    what: str
    microseconds: float
    predict: Callable[[Timing], float]

    def factor(self, timing: Timing) -> float:
        """Prediction over measurement."""
        return self.predict(timing) / self.microseconds


def read_rows(measured: dict[str, Any], device: str) -> tuple[list[Row], list[Row]]:
    """Rows of single linears, with those of a linear's first launches, and rows of steps."""
    chosen = get_device(device)
    without = measured.get("without_clusters", {"linears": [], "steps": []})
    tables = ((measured, chosen, ""), (without, chosen.model_copy(update={"clusters": False}), ", no clusters"))
    linears, steps = [], []
    for table, on, note in tables:
        for entry in table["linears"]:
            k, n, tokens = entry["k"], entry["n"], entry["tokens"]
            for name, value in entry.items():
                kind, _, launches = name.partition(" launches ")
                if kind in KINDS and value is not None:
                    count = len(launches.strip("(,)").split(",")) if launches else None
                    predict = _one(kind, Linear(k, (n,)), tokens, on, count)
                    linears.append(Row(kind + note, f"{k} x {n}, {tokens}", value, predict))
        for entry in table["steps"]:
            if entry["kind"] in KINDS:
                stack = find_model(MODELS[entry["model"]]).text
                parts = [_one(entry["kind"], linear, entry["tokens"], on, None) for linear in block_linears(stack)]
                what = f"{entry['model']}, {entry['tokens']}"
                steps.append(Row(entry["kind"] + note, what, entry["microseconds"], _all(parts, stack.layers)))
    return linears, steps


def _one(kind: str, linear: Linear, tokens: int, chosen: Device, launches: int | None) -> Callable[[Timing], float]:
    way, scheme, adapters = KINDS[kind]

    def predict(timing: Timing) -> float:
        tables = Tables(chosen, instruction_table(), timing, device_table().other_cycles)
        kernels: list[Kernel] = linear_kernels(way, linear, tokens, scheme, adapters, tables)[:launches]
        return sum(kernel.total(chosen, timing, chosen.launch_us.graph) for kernel in kernels)

    return predict


def _all(parts: Sequence[Callable[[Timing], float]], times: int) -> Callable[[Timing], float]:
    return lambda timing: times * sum(part(timing) for part in parts)


def halves(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to fit to and rows to check with, drawn at random with a fixed seed."""
    order = np.random.default_rng(0).permutation(len(rows))
    middle = len(rows) // 2
    return [rows[index] for index in order[:middle]], [rows[index] for index in order[middle:]]


def fit(linears: Sequence[Row], steps: Sequence[Row]) -> Timing:
    """The timing that is nearest to the rows in the logarithm of their factors, starting from the present one."""
    rows = [*linears, *steps]
    weights = np.array([1.0] * len(linears) + [STEP_WEIGHT] * len(steps))
    start = _flat(timing_table().model_dump())
    names = list(start)
    origin = np.log([start[name] for name in names])

    def residuals(values: np.ndarray) -> np.ndarray:
        timing = _timing(dict(zip(names, np.exp(values), strict=True)))
        errors = np.log([row.factor(timing) for row in rows]) * weights
        return np.concatenate([errors, 0.02 * (values - origin)])  # what no row says stays as it is

    upper = np.where([name in ("bandwidth", "tensor", "overlapped_launch") for name in names], 0.0, np.inf)
    found = least_squares(
        residuals, np.minimum(origin, upper - 1e-3), bounds=(-np.inf, upper), loss="soft_l1", f_scale=0.15
    )
    return _timing({name: float(f"{np.exp(value):.3g}") for name, value in zip(names, found.x, strict=True)})


def _flat(values: dict[Any, Any], prefix: tuple[Any, ...] = ()) -> dict[tuple[Any, ...] | str, float]:
    found: dict[Any, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, (*prefix, key))
        else:
            found[(*prefix, key) if prefix else key] = value
    return found


def _timing(values: dict[Any, float]) -> Timing:
    nested: dict[Any, Any] = {}
    for key, value in values.items():
        path = key if isinstance(key, tuple) else (key,)
        inner = nested
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = float(value)
    return Timing.model_validate(nested)


def spread(rows: Sequence[Row], timing: Timing) -> np.ndarray:
    """Factors between prediction and measurement, all at least 1."""
    return np.exp(np.abs(np.log([row.factor(timing) for row in rows])))


def main() -> int:
    """Print the table and one JSON line."""
    parser = argparse.ArgumentParser(description="How far predictions are from measurements.")
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS)
    parser.add_argument("--device", default="h100")
    parser.add_argument("--fit", action="store_true", help="fit the timing to half of the rows, and store it")
    arguments = parser.parse_args()
    measured = json.loads(arguments.file.read_text(encoding="utf-8"))
    linears, steps = read_rows(measured, arguments.device)
    fitted, checked = halves(linears)
    fitted_steps, _ = halves(steps)
    timing = fit(fitted, fitted_steps) if arguments.fit else timing_table()
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in checked:
        by_kind[row.kind].append(row)
    print(f"{measured['device']}, commit {measured['commit']}: factor between prediction and measurement\n")
    print(f"{'linears not used for the fit':36}{'rows':>6}{'median':>8}{'9 of 10':>9}{'worst':>8}")
    for kind, rows in by_kind.items():
        factors = spread(rows, timing)
        print(f"{kind:36}{len(rows):6}{np.median(factors):8.2f}{np.quantile(factors, SHARE):9.2f}{factors.max():8.2f}")
    factors, all_steps = spread(checked, timing), spread(steps, timing)
    print(
        f"{'all':36}{len(checked):6}{np.median(factors):8.2f}{np.quantile(factors, SHARE):9.2f}{factors.max():8.2f}\n"
    )
    print(f"{'step of 28 layers':44}{'measured us':>12}{'predicted':>11}{'ratio':>7}  used for the fit")
    for row in steps:
        numbers = f"{row.microseconds:12.0f}{row.predict(timing):11.0f}{row.factor(timing):7.2f}"
        print(f"{row.what + ', ' + row.kind:44}{numbers}  {'yes' if row in fitted_steps else ''}")
    accuracy = {
        "device": measured["device"].partition(",")[0],
        "rows": len(checked),
        "median": round(float(np.median(factors)), 3),
        "nine_of_ten": round(float(np.quantile(factors, SHARE)), 3),
        "worst_step": round(float(all_steps.max()), 3),
    }
    print("\n" + json.dumps(accuracy))
    if arguments.fit:
        _store(timing, accuracy)
    within = all_steps.max() <= STEP_LIMIT and float(np.mean(factors <= LINEAR_LIMIT)) >= SHARE
    return 0 if within else 1


def _store(timing: Timing, accuracy: dict[str, object]) -> None:
    file = DATA / "timing.yaml"
    comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = yaml.safe_dump(timing.model_dump(), sort_keys=False, default_flow_style=None, width=400)
    file.write_text("\n".join(comments) + "\n" + text, encoding="utf-8")
    (DATA / "accuracy.json").write_text(json.dumps(accuracy, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
