"""The kit's file and its short tables: ratios to cuBLAS FP16 are made here, from rows of the same run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from device.torch_peers import FLOAT16

Row = dict[str, Any]
Key = tuple[Any, ...]


@dataclass
class Report:
    """device.json. qe_edge/report/device_check.py reads it.

    Attributes:
        device: Name of the GPU.
        capability: Its compute capability.
        multiprocessors: How many it has.
        l2_bytes: Size of its L2 cache.
        cuda: CUDA version of its driver, as the driver writes it: 13000 is 13.0.
        driver: Version of the driver.
        torch: Version of torch, which the peers use.
        host: Architecture of the machine.
        date: When the run began, in UTC.
        commit: Git's commit of the kit.
        kernels: SHA-256 of the file with the kernels.
        overlaps: Whether launches overlapped.
        copied_gb_per_second: What a copy on the GPU read and wrote, in units of 10^9.
        numerics: Every result that was compared.
        linears: Our times of single layers.
        steps: Our times of whole steps.
        peer_linears: Times of single products by others.
        peer_steps: Times of whole steps by others.
        skipped: What was not measured, and why.
        failures: What went wrong besides results: a launch that failed, counters that were not zero.
        seconds: How long the run took.
    """

    device: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    cuda: int
    driver: str
    host: str
    date: str
    commit: str
    kernels: str
    torch: str = ""
    overlaps: bool = False
    copied_gb_per_second: float | None = None
    numerics: list[Row] = field(default_factory=list)
    linears: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)
    peer_linears: list[Row] = field(default_factory=list)
    peer_steps: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def wrong(self) -> list[Row]:
        """Results that were not right."""
        return [row for row in self.numerics if not row["passed"]]

    def add_ratios(self) -> None:
        """Give every row of whole plans and of peers `times_float16`: how many times as fast as cuBLAS FP16."""
        for ours, peers in ((self.linears, self.peer_linears), (self.steps, self.peer_steps)):
            float16 = {_key(row): row["microseconds"] for row in peers if row["peer"] == FLOAT16}
            for row in (*ours, *peers):
                base = float16.get(_key(row))
                whole = row.get("launches") == row.get("of_launches", row.get("launches"))
                row["times_float16"] = base / row["microseconds"] if base and whole else None

    def write(self, path: Path) -> None:
        """To a temporary name first."""
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps({"kind": "qe_edge.device_check", **asdict(self)}, indent=1), encoding="utf-8")
        part.replace(path)


def _key(row: Row) -> Key:
    return row["model"], row.get("k"), row.get("n"), row["tokens"]


def _name(row: Row) -> str:
    return str(row.get("peer") or row["mode"])


def whole_plans(rows: Iterable[Row]) -> list[Row]:
    """One row per layer and mode: all launches, with the faster tile."""
    best: dict[Key, Row] = {}
    for row in rows:
        key = (*_key(row), row["mode"])
        if row["launches"] == row["of_launches"] and (
            key not in best or row["microseconds"] < best[key]["microseconds"]
        ):
            best[key] = row
    return list(best.values())


def table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    lines = [[title, *head], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def step_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Microseconds of every step, and how many times as fast as cuBLAS FP16: heads of columns, and lines."""
    rows = [*report.peer_steps, *report.steps]
    columns = sorted({(str(row["model"]), int(row["tokens"])) for row in rows})
    lines = []
    for name in dict.fromkeys(map(_name, rows)):
        cells = {(row["model"], row["tokens"]): row for row in rows if _name(row) == name}
        lines.append([name, *(_step_cell(cells.get(column)) for column in columns)])
    return [f"{model.removeprefix('Qwen2-VL-')}, {tokens} tok" for model, tokens in columns], lines


def _step_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    ratio = row["times_float16"]
    return f"{row['microseconds']:.0f}" + (f" ({ratio:.2f}x)" if ratio else "")


def linear_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """Geometric mean over all layers of how many times as fast as cuBLAS FP16, by number of tokens."""
    rows = [*report.peer_linears, *whole_plans(report.linears)]
    tokens = sorted({int(row["tokens"]) for row in rows})
    lines = []
    for name in dict.fromkeys(map(_name, rows)):
        cells = []
        for m in tokens:
            ratios = [row["times_float16"] for row in rows if _name(row) == name and row["tokens"] == m]
            known = [math.log(ratio) for ratio in ratios if ratio]
            cells.append(f"{math.exp(sum(known) / len(known)):.2f}" if known else "-")
        lines.append([name, *cells])
    return [f"{m} tok" for m in tokens], lines


def summary(report: Report) -> str:
    """What the command prints at its end."""
    right = len(report.numerics) - len(report.wrong)
    worst = max((row["error"] for row in report.numerics), default=math.nan)
    lines = [
        f"{report.device}: {right} of {len(report.numerics)} results right, largest error {worst:.1e}, "
        f"{report.seconds:.0f} s"
    ]
    if report.copied_gb_per_second is not None:
        lines.append(f"memory: {report.copied_gb_per_second:.0f} GB/s read and written by a copy")
    if report.steps or report.peer_steps:
        lines += ["", table("step, us", *step_cells(report))]
    if report.linears or report.peer_linears:
        lines += ["", table("layer, x FP16", *linear_cells(report))]
    if report.skipped:
        lines += ["", *(f"not measured: {what}: {why}" for what, why in report.skipped.items())]
    lines += [f"wrong: {row}" for row in report.wrong]
    lines += [f"failed: {failure}" for failure in report.failures]
    return "\n".join(lines)
