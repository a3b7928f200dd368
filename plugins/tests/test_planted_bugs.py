"""Rung 4: every planted bug must be caught, by wrong numbers or by the emulator's checks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from emulator.build import ROOT, ptx, source_emulator
from emulator.plan import Planner, Tactic
from emulator.ptx import PtxMachine
from emulator.session import Machine, run_linear
from emulator.source import SourceMachine
from prepack.reference import qe_linear
from tests.cases import LIMIT, random_layer, random_tokens, relative_error
from tests.forced import forced_slices
from tests.modes import shape_for, tactic_for
from tests.planted import PLAN, PLANTED, Planted

SEEDS = (1, 2, 3)


def symptoms(machine: Machine, planner: Planner, bug: Planted) -> list[str]:
    """What is wrong with the run that shows a bug, over a few schedules."""
    mode, tokens = bug.mode, bug.tokens
    k, n = bug.shape or shape_for(mode, tokens)
    k = max(k, 648 if mode.group_size < 0 else 640)  # enough chunks to wrap the pipeline
    layer, x = random_layer(mode, k, n), random_tokens(mode, tokens, k)
    reference = qe_linear(layer, x, mode.dtype)
    planner = forced_slices(planner, bug.slices) if bug.slices else planner
    tactic = Tactic(bug.rows, 0, 192) if bug.slices or bug.rows else tactic_for(tokens)
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
    return Planner.load(source_emulator(ROOT, subset=4))


def machine_of(root: Path, rung: str, bits: int) -> Machine:
    if rung == "source":
        return SourceMachine(source_emulator(root, subset=bits))
    return PtxMachine(ptx(root, subset=bits), sm_90=True)


CASES = {(bug.mode.name, bug.tokens, bug.slices, bug.shape, bug.rows): bug for bug in PLANTED}


@pytest.mark.parametrize("rung", ["source", "ptx"])
@pytest.mark.parametrize("case", CASES.values(), ids=["-".join(map(str, case)) for case in CASES])
def test_clean_code_passes(case: Planted, rung: str, planner: Planner) -> None:
    """Without this, a test that always complains would look like one that catches everything."""
    assert symptoms(machine_of(ROOT, rung, case.mode.weight_bits), planner, case) == []


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_is_caught(bug: Planted, planner: Planner, tmp_path: Path) -> None:
    root = tmp_path / "plugins"
    for folder in ("kernels", "include", "host", "emulator"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = root / bug.file
    text = path.read_text()
    assert text.count(bug.before) == 1, f"{bug.name}: the code has changed; update tests/planted.py"
    path.write_text(text.replace(bug.before, bug.after))
    machine = machine_of(root, bug.rung, bug.mode.weight_bits)
    if bug.file == PLAN:
        planner = Planner.load(source_emulator(root, subset=bug.mode.weight_bits))
    assert symptoms(machine, planner, bug), f"not caught: {bug.name}"
