"""Rung 4: every planted bug must be caught, by wrong numbers or by the emulator's checks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from emulator.build import ROOT, ptx, source_emulator
from emulator.plan import Planner
from emulator.ptx import PtxMachine
from emulator.session import Machine, run_linear
from emulator.source import SourceMachine
from prepack.reference import qe_linear
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.modes import shape_for
from tests.planted import (
    HALF,
    HALF_LONE,
    HALF_W3,
    INT4_FACTORS,
    INT8,
    INT8_W3,
    LONE,
    PLANTED,
    ZEROS,
    ZEROS_64,
    ZEROS_64_ROUTED,
    Planted,
)

SEEDS = (1, 2, 3)


def symptoms(machine: Machine, planner: Planner, mode: Mode, tokens: int) -> list[str]:
    """What is wrong with a run, over a few schedules."""
    k, n = shape_for(mode, tokens)
    k = max(k, 648 if mode.group_size < 0 else 640)  # enough chunks to wrap the pipeline
    layer, x = random_layer(mode, k, n), random_tokens(mode, tokens, k)
    reference = qe_linear(layer, x, mode.dtype)
    found: list[str] = []
    for seed in SEEDS:
        outcome = run_linear(machine, planner, layer, x, mode.dtype, seed=seed)
        error = relative_error(outcome.y, reference)
        found += outcome.errors + ([f"relative error {error:.1e}"] if error > LIMIT[mode.dtype] else [])
        if found:
            break
    return found


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner.load(source_emulator(ROOT, subset=4))


def machine_of(root: Path, rung: str, bits: int) -> Machine:
    if rung == "source":
        return SourceMachine(source_emulator(root, subset=bits))
    return PtxMachine(ptx(root, subset=bits))


@pytest.mark.parametrize("rung", ["source", "ptx"])
@pytest.mark.parametrize(
    ("mode", "tokens"),
    [
        (LONE, 3), (LONE, 40), (INT8, 3), (INT8, 40), (HALF, 3), (HALF, 17), (HALF_LONE, 11), (ZEROS, 3), (ZEROS, 17),
        (ZEROS_64, 3), (ZEROS_64, 17), (ZEROS_64_ROUTED, 40), (INT8_W3, 3), (INT8_W3, 17), (HALF_W3, 3), (HALF_W3, 17),
        (INT4_FACTORS, 3), (INT4_FACTORS, 17),
    ],
)  # fmt: skip
def test_clean_code_passes(mode: Mode, tokens: int, rung: str, planner: Planner) -> None:
    """Without this, a test that always complains would look like one that catches everything."""
    assert symptoms(machine_of(ROOT, rung, mode.weight_bits), planner, mode, tokens) == []


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
    assert symptoms(machine, planner, bug.mode, bug.tokens), f"not caught: {bug.name}"
