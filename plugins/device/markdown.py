"""The tables of DEVICE.md, made from the kit's file.

python -m device.markdown OUT_FOLDER/device.json >> notes.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from device.report import Report, linear_cells, step_cells


def markdown(title: str, head: list[str], rows: list[list[str]]) -> str:
    """One table, numbers to the right.

    >>> print(markdown("step", ["1"], [["w4a8", "20"]]))
    | step | 1 |
    | --- | ---: |
    | w4a8 | 20 |
    """
    lines = [[title, *head], ["---", *["---:"] * len(head)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def results(report: Report) -> str:
    """What DEVICE.md says of one GPU."""
    right = len(report.numerics) - len(report.wrong)
    worst = max(row["error"] for row in report.numerics)
    memory = "" if report.copied_gb_per_second is None else f" A copy moves {report.copied_gb_per_second:.0f} GB/s."
    cuda = f"{report.cuda // 1000}.{report.cuda % 1000 // 10}"
    return "\n\n".join([
        f"{report.device}, driver {report.driver} (CUDA {cuda}), torch {report.torch}, {report.date[:10]}, commit "
        f"{report.commit[:7]}: {right} of {len(report.numerics)} results right, largest error {worst:.1e}.{memory}",
        markdown("Linear layers of one step, us (times as fast as cuBLAS FP16)", *step_cells(report)),
        markdown("One layer, times as fast as cuBLAS FP16", *linear_cells(report)),
    ])  # fmt: skip


def read(path: Path) -> Report:
    """The file that `device.check` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["kind"]
    return Report(**data)


if __name__ == "__main__":
    print(results(read(Path(sys.argv[1]))))
