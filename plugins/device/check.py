"""Check and time the kernels on this machine's GPU. DEVICE.md says where that has been done.

    python -m device.check OUT.json [--seconds S] [--quick] [--kernels FILE] [--commit TEXT]

Results first: every mode against the float64 reference, small shapes and real ones. Then times: memory, whole steps and
single layers of Qwen2-VL-2B and 7B, and the same by peers in a process of their own. The exit code is 1 when anything
is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from device import cases, peer_process, timing
from device.correctness import Checker, check_all
from device.driver import DeviceError, Driver
from device.gpu import Gpu, load_gpu
from device.peers import run_peers
from device.report import Report, summary
from emulator.build import BUILD, ROOT, plan_library
from emulator.plan import Planner
from tests.modes import COMBINATIONS

SECONDS = 200.0
RESULTS_SHARE, TIMES_SHARE = 0.3, 0.3  # of the seconds; the rest is the peers'
LEAST_FOR_PEERS = 10.0
LIBRARY = "libcuda.so.1"


def _said(command: list[str]) -> str:
    """The first line that a program prints, or "unknown"."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return lines[0] if lines and not done.returncode else "unknown"


def kernels_file(library: str) -> Path:
    """The fatbin of the plugin's build folder, else of `device_check.sh`, for the driver's CUDA version."""
    name = "cuda13.fatbin" if Driver(library).integer("cuDriverGetVersion") >= 13000 else "cuda12.fatbin"
    found = [folder / name for folder in (BUILD / "plugin", BUILD / "payload")]
    return next((path for path in found if path.is_file() and path.stat().st_size), found[-1])


def begin(gpu: Gpu, kernels: Path, commit: str | None) -> Report:
    """What is known before anything has run."""
    return Report(
        device=gpu.name, capability=divmod(gpu.capability, 10), multiprocessors=gpu.multiprocessors,
        l2_bytes=gpu.l2_bytes, cuda=gpu.cuda,
        driver=_said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        host=platform.machine(), date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit or _said(["git", "rev-parse", "HEAD"]),
        kernels=hashlib.sha256(kernels.read_bytes()).hexdigest(),
    )  # fmt: skip


def take_rows(rows: Iterable[dict[str, Any]], into: list[dict[str, Any]], report: Report, what: str) -> None:
    """Keep rows; those that say why there is none are counted by their reason."""
    left_out: dict[str, list[str]] = {}
    for row in rows:
        if "skipped" in row:
            left_out.setdefault(row["skipped"], []).append(row["what"])
        else:
            into.append(row)
    for reason, missing in left_out.items():
        report.skipped[f"{len(missing)} {what}, the first of them {missing[0]}"] = reason


def results(report: Report, checker: Checker, *, quick: bool, deadline: float) -> None:
    """Compare with the reference."""
    small = list(cases.small_requests())
    if quick:
        small = small[: len(small) - len(COMBINATIONS)]
    found, _ = check_all(checker, small, float("inf"))  # never cut short
    if not quick:
        real, left_out = check_all(checker, cases.real_requests(), deadline)
        found += real
        if left_out:
            report.skipped[f"results of {left_out} large layers"] = "The time was up."
    report.numerics = [result.row() for result in found]


def times(report: Report, gpu: Gpu, planner: Planner, deadline: float) -> None:
    """Our times."""
    report.copied_gb_per_second = timing.copied_gb_per_second(gpu)
    watch = timing.Stopwatch(gpu, planner)
    take_rows(timing.step_rows(watch, deadline), report.steps, report, "steps")
    take_rows(timing.linear_rows(watch, deadline), report.linears, report, "single layers")
    report.overlaps = gpu.overlaps
    watch.close()


def check(report: Report, gpu: Gpu, planner: Planner, seconds: float, out: Path, *, quick: bool) -> None:
    """Everything, within about `seconds`. The file is written after each part: what comes later cannot lose it."""
    began = time.monotonic()

    def done(what: str) -> None:
        report.seconds = round(time.monotonic() - began, 1)
        report.add_ratios()
        report.write(out)
        print(f"{report.seconds:6.1f} s  {what}", file=sys.stderr, flush=True)

    try:
        results(report, Checker(gpu, planner), quick=quick, deadline=began + RESULTS_SHARE * seconds)
        done(f"{len(report.numerics) - len(report.wrong)} of {len(report.numerics)} results right")
        if not quick:
            times(report, gpu, planner, time.monotonic() + TIMES_SHARE * seconds)
            done(f"{len(report.steps)} steps, {len(report.linears)} times of layers")
    except (DeviceError, timing.CounterError) as error:
        report.failures.append(str(error))
    if quick:
        report.skipped["times"] = "--quick was given."
    else:
        left = max(LEAST_FOR_PEERS, seconds - (time.monotonic() - began))
        found = run_peers(list(peer_process.NAMES), timing.beyond_cache(gpu), left)
        report.peer_linears, report.peer_steps = found.linears, found.steps
        report.torch = found.torch or "not used"
        report.skipped.update(found.skipped)
    done("all")


def main() -> int:
    """Write one JSON file and print the tables; the exit code is 1 when a result is wrong."""
    parser = argparse.ArgumentParser(description="Check and time the QELinear kernels on this machine's GPU.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="about how long it may take")
    parser.add_argument("--quick", action="store_true", help="small results only, as under compute-sanitizer")
    parser.add_argument("--kernels", type=Path, help="a fatbin or cubin instead of the plugin's own")
    parser.add_argument("--commit", help="git's commit, where the sources are no clone")
    options = parser.parse_args()
    try:
        kernels = options.kernels or kernels_file(LIBRARY)
        gpu = load_gpu(kernels, LIBRARY)
    except DeviceError as error:
        print(error, file=sys.stderr)
        return 1
    report = begin(gpu, kernels, options.commit)
    check(report, gpu, Planner.load(plan_library()), options.seconds, options.out, quick=options.quick)
    print(summary(report))
    return 1 if report.wrong or report.failures or not report.numerics else 0


if __name__ == "__main__":
    sys.exit(main())
