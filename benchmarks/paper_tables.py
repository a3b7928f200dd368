r"""The tables of the paper: accuracy of the original and of quantized checkpoints on its tasks, beside their bits.

    python -m venv lmms && lmms/bin/pip install lmms-eval . && qe-edge quantize MODEL -o checkpoint --calibration ...
    python benchmarks/paper_tables.py MODEL checkpoint [more checkpoints] --python lmms/bin/python -o out/tables

lmms-eval has requirements of its own, so it runs in an environment of its own, through `lmms_adapter.py`; QE-Edge must
be installed there too. It downloads its data sets from the Hugging Face hub. Every model and task is a process and a
file of its own below OUT, with a log beside it; a second run evaluates only what is missing or older than its model.

`--tasks` takes names of the paper's tasks, or `NAME=TASK:METRIC` for any other task of lmms-eval, also of one that
`--include` has. `--limit` makes a quick look at the first questions, which is no result to report.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qe_edge.report.wording import significant
from qe_edge.system.errors import ArtifactError, QEError, RecipeError, ResourceError, UnknownNameError

ADAPTER = Path(__file__).with_name("lmms_adapter.py")
REMEDY = "Make one: python -m venv lmms && lmms/bin/pip install lmms-eval . (in the folder of QE-Edge)."
TASK_FORM = re.compile(r"([^=]+)=([^=:]+):(.+)")


@dataclass(frozen=True)
class Task:
    """A column of the table.

    Attributes:
        title: As in the paper.
        name: Task or group of lmms-eval.
        metric: Its metric, 0 to 1.
    """

    title: str
    name: str
    metric: str


TASKS = {
    task.title: task
    for task in (
        Task("MMMU", "mmmu_val", "mmmu_acc"),
        Task("OCRBench", "ocrbench", "ocrbench_accuracy"),
        Task("ScienceQA", "scienceqa_img", "exact_match"),
        Task("TextVQA", "textvqa_val", "exact_match"),
        Task("VizWiz", "vizwiz_vqa_val", "exact_match"),
        Task("AI2D", "ai2d", "exact_match"),
        Task("ChartQA", "chartqa", "relaxed_overall"),
        Task("DocVQA", "docvqa_val", "anls"),
        Task("InfoVQA", "infovqa_val", "anls"),
        Task("MMStar", "mmstar", "average"),
        Task("MuirBench", "muirbench", "muirbench_score_overall"),
        Task("MMLU", "mmlu_generative", "exact_match"),
    )
}


@dataclass(frozen=True)
class Environment:
    """Where lmms-eval is installed, and how it is called.

    Attributes:
        python: Its interpreter.
        include: Folder with further tasks, or None.
        limit: Questions of every task, or None for all.
        device: As torch names it, or None for the adapter's choice.
    """

    python: Path
    include: Path | None = None
    limit: int | None = None
    device: str | None = None

    def check(self) -> None:
        """Refuse an environment that lacks something, before any long work.

        Raises:
            ResourceError: Saying what it lacks.
        """
        if not self.python.is_file():
            raise ResourceError(f"There is no Python interpreter '{self.python}'.", REMEDY)
        for package in ("qe_edge", "lmms_eval.evaluator"):
            # from where the adapter lies: in a clone's root, "import qe_edge" would find the bare folder
            finished = self._run("-c", f"import {package}", folder=ADAPTER.parent)
            if finished.returncode:
                raise ResourceError(f"'{self.python}' cannot import {package}: {last_line(finished.stderr)}.", REMEDY)

    def evaluate(self, model: str, task: Task, result: Path) -> None:
        """Run one model on one task.

        Raises:
            ArtifactError: If it fails; everything that was said is in the log beside `result`.
        """
        options = {"--include": self.include, "--limit": self.limit, "--device": self.device}
        given = [str(part) for name, value in options.items() if value is not None for part in (name, value)]
        result.parent.mkdir(parents=True, exist_ok=True)
        finished = self._run(str(ADAPTER), model, task.name, str(result), *given)
        log = result.with_suffix(".log")
        log.write_text(finished.stdout + finished.stderr, encoding="utf-8")
        if finished.returncode or not result.is_file():
            raise ArtifactError(
                f"{task.title} on '{model}' failed: {last_line(finished.stderr)}.",
                f"See {log}; if data are missing, check the network, or set HF_HOME to where they are.",
            )

    def _run(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(self.python.absolute()), *arguments]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        model: Folder or hub id.
        stored: Bits per weight of the quantized layers, everything included; of the original, of its precision.
        read: Bits per weight that one decoded token reads.
        scores: By title of the task, 0 to 1.
    """

    model: str
    stored: float
    read: float
    scores: dict[str, float]


def choose_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks of the paper by name, or others as `NAME=TASK:METRIC`.

    Raises:
        UnknownNameError: If the paper has no such task.
    """
    chosen = []
    for name in names:
        other = TASK_FORM.fullmatch(name)
        if other is None and name not in TASKS:
            raise UnknownNameError("task", name, TASKS)
        chosen.append(Task(*other.groups()) if other else TASKS[name])
    return chosen


def make_row(model: str, tasks: Sequence[Task], environment: Environment, out: Path) -> Row:
    """Evaluate what is not yet known of a model, and read its results.

    Raises:
        ArtifactError: If an evaluation fails or its result lacks the task's metric.
    """
    folder = out / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', Path(model).name)}-{zlib.crc32(str(model).encode()):08x}"
    scores: dict[str, float] = {}
    found: dict[str, Any] = {}
    for task in tasks:
        result = folder / f"{task.name}.json"
        known = read_result(result, model, environment.limit)
        if known is None:
            print(f"{task.title} on {model} ...", file=sys.stderr, flush=True)
            result.unlink(missing_ok=True)
            environment.evaluate(model, task, result)
            known = json.loads(result.read_text(encoding="utf-8"))
        found = known
        scores[task.title] = score_of(found, task)
    return Row(model, found["stored_bits"], found["read_bits"], scores)


def read_result(result: Path, model: str, limit: int | None) -> dict[str, Any] | None:
    """An earlier result, or None if there is none of this limit that is newer than the model's weights."""
    try:
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        written = result.stat().st_mtime
    except (OSError, ValueError):
        return None
    weights = [path.stat().st_mtime for path in Path(model).glob("*.safetensors")]
    return found if found.get("limit") == limit and written > max(weights, default=0) else None


def score_of(found: dict[str, Any], task: Task) -> float:
    """The task's metric; of a group that does not say it, the mean over the questions of all its tasks.

    Raises:
        ArtifactError: If the result lacks it.
    """
    results = found["results"]
    whole = metric_of(results.get(task.name, {}), task.metric)
    if whole is not None:
        return whole
    sizes = {name: size["effective"] for name, size in found.get("samples", {}).items()}
    parts = {name: metric_of(numbers, task.metric) for name, numbers in results.items() if sizes.get(name)}
    known = {name: value for name, value in parts.items() if value is not None}
    if not known:
        names = sorted({key.partition(",")[0] for key in results.get(task.name, {})} - {"alias"})
        raise ArtifactError(
            f"The result of {task.title} has no number for '{task.metric}', only for {', '.join(names) or 'nothing'}.",
            f"Name the metric: --tasks '{task.title}={task.name}:METRIC'.",
        )
    return sum(value * sizes[name] for name, value in known.items()) / sum(sizes[name] for name in known)


def metric_of(numbers: dict[str, Any], metric: str) -> float | None:
    """A metric, whatever filter lmms-eval put the answers through; of several filters the last."""
    values = [value for key, value in numbers.items() if key.partition(",")[0] == metric]
    values = [value for value in values if isinstance(value, int | float)]
    return float(values[-1]) if values else None


def cells(row: Row, tasks: Sequence[Task]) -> list[str]:
    """The row as text, accuracies in percent, their mean last."""
    scores = [row.scores[task.title] for task in tasks]
    percents = [f"{100 * score:.1f}" for score in (*scores, sum(scores) / len(scores))]
    return [Path(row.model).name, significant(row.stored), significant(row.read), *percents]


def last_line(text: str) -> str:
    """What a failed program said last, without a final full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else "no message"


def main() -> int:
    """Print the table row by row, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", help="the original model: a folder or a hub id")
    parser.add_argument("checkpoints", nargs="*", help="folders that qe-edge quantize wrote")
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment with lmms-eval")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder of the results")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--include", type=Path, help="folder with further tasks of lmms-eval")
    parser.add_argument("--limit", type=int, help="questions of every task")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    options = parser.parse_args()
    try:
        tasks = choose_tasks(options.tasks)
        if options.limit is not None and options.limit < 1:
            raise RecipeError(f"A limit of {options.limit} leaves no question.", "Give at least 1.")
        environment = Environment(options.python, options.include, options.limit, options.device)
        environment.check()
        headings = ["model", "stored", "read", *(task.title for task in tasks), "mean"]
        widths = [max(24, *(len(Path(model).name) for model in (options.original, *options.checkpoints)))]
        widths += [max(8, len(heading) + 2) for heading in headings[1:]]
        show(headings, widths)
        rows = []
        for model in (options.original, *options.checkpoints):
            rows.append(make_row(model, tasks, environment, options.output))
            show(cells(rows[-1], tasks), widths)
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    found = [{"model": row.model, "stored": row.stored, "read": row.read, **row.scores} for row in rows]
    print(json.dumps({"script": "paper_tables", "limit": options.limit, "rows": found}))
    return 0


def show(row: Sequence[str], widths: Sequence[int]) -> None:
    """One line of the table."""
    first, *others = zip(row, widths, strict=True)
    print(f"{first[0]:{first[1]}}" + "".join(f"{cell:>{width}}" for cell, width in others), flush=True)


if __name__ == "__main__":
    sys.exit(main())
