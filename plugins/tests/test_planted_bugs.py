"""Rung 4: every planted bug must be caught, by wrong numbers or by the emulator's checks."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from emulator.build import ROOT, keep_kernels, plan_library, ptx, source_emulator
from emulator.plan import Buffers, Planner, Tactic
from emulator.ptx import PtxMachine
from emulator.session import Machine, problem_of, run_linear
from emulator.source import SourceMachine
from prepack.linear import CanonicalLinear
from prepack.reference import qe_linear
from tests.cases import LIMIT, random_layer, random_tokens, relative_error
from tests.forced import forced_slices
from tests.modes import shape_for, tactic_for
from tests.planted import PLANTED, Planted

SEEDS = (1, 2, 3)


def example(bug: Planted) -> tuple[CanonicalLinear, NDArray[np.float32]]:
    """The layer that shows a bug, and its tokens."""
    k, n = bug.shape or shape_for(bug.mode, bug.tokens)
    k = max(k, 648 if bug.mode.group_size < 0 else 640)  # enough chunks to wrap the pipeline
    return random_layer(bug.mode, k, n), random_tokens(bug.mode, bug.tokens, k)


def planned(planner: Planner, bug: Planted) -> tuple[Planner, Tactic]:
    """The planner and the tactic for that layer."""
    if bug.clusters:
        return planner, Tactic(multiprocessors=2 * bug.clusters, clusters=bug.clusters)
    planner = forced_slices(planner, bug.slices) if bug.slices else planner
    return planner, Tactic(bug.rows, 0, 192) if bug.slices or bug.rows else tactic_for(bug.tokens)


def kernels_of(planner: Planner, bug: Planted) -> set[str]:
    """The kernels that the layer launches."""
    planner, tactic = planned(planner, bug)
    problem = problem_of(example(bug)[0], bug.tokens, bug.mode.dtype)
    buffers = Buffers(counters=256 if planner.counter_bytes(problem) else 0)
    return {launch.name for launch in planner.launches(problem, buffers, tactic)}


def symptoms(machine: Machine, planner: Planner, bug: Planted) -> list[str]:
    """What is wrong with the run that shows a bug, over a few schedules."""
    mode = bug.mode
    layer, x = example(bug)
    reference = qe_linear(layer, x, mode.dtype)
    planner, tactic = planned(planner, bug)
    found: list[str] = []
    first: NDArray[np.float32] | None = None
    for seed in SEEDS:
        outcome = run_linear(machine, planner, layer, x, mode.dtype, seed=seed, tactic=tactic)
        error = relative_error(outcome.y, reference)
        found += outcome.errors + ([f"relative error {error:.1e}"] if error > LIMIT[mode.dtype] else [])
        first = outcome.y if first is None else first
        if not np.array_equal(first, outcome.y):
            found.append("another schedule gives other bits")
        if found:
            break
    return found


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner.load(plan_library())


@cache
def machine_of(root: Path, rung: str) -> Machine:
    return SourceMachine(source_emulator(root)) if rung == "source" else PtxMachine(ptx(root), sm_90=True)


CASES = {(bug.mode.name, bug.tokens, bug.slices, bug.shape, bug.rows, bug.clusters): bug for bug in PLANTED}


@pytest.mark.parametrize("rung", ["source", "ptx"])
@pytest.mark.parametrize("case", CASES.values(), ids=["-".join(map(str, case)) for case in CASES])
def test_clean_code_passes(case: Planted, rung: str, planner: Planner) -> None:
    """Without this, a test that always complains would look like one that catches everything."""
    assert symptoms(machine_of(ROOT, rung), planner, case) == []


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_is_caught(bug: Planted, tmp_path: Path) -> None:
    root = tmp_path / "plugins"
    for folder in ("kernels", "include", "host", "emulator"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = root / bug.file
    text = path.read_text()
    assert text.count(bug.before) == 1, f"{bug.name}: the code has changed; update tests/planted.py"
    path.write_text(text.replace(bug.before, bug.after))
    planner = Planner.load(plan_library(root))
    keep_kernels(root, kernels_of(planner, bug).__contains__)
    assert symptoms(machine_of(root, bug.rung), planner, bug), f"not caught: {bug.name}"
