"""Rung 3: the PTX that ships, against the float64 reference."""

from __future__ import annotations

import pytest

from emulator.plan import Buffers, Planner, Tactic
from emulator.ptx import PtxMachine
from emulator.session import problem_of, run_linear
from prepack.reference import qe_linear
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.modes import COMBINATION_IDS, COMBINATIONS, MODES, TOKENS, shape_for


def check(mode: Mode, tokens: int, planner: Planner, machine: PtxMachine, tactic: Tactic | None = None) -> None:
    k, n = shape_for(mode, tokens)
    layer, x = random_layer(mode, k, n, seed=tokens), random_tokens(mode, tokens, k)
    outcome = run_linear(machine, planner, layer, x, mode.dtype, tactic=tactic)
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, mode.dtype)) <= LIMIT[mode.dtype]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_matches_reference(mode: Mode, tokens: int, planner: Planner, ptx_machine: PtxMachine) -> None:
    check(mode, tokens, planner, ptx_machine)


@pytest.mark.parametrize(("mode", "tokens"), COMBINATIONS, ids=COMBINATION_IDS)
def test_every_combination(mode: Mode, tokens: int, planner: Planner, ptx_machine: PtxMachine) -> None:
    check(mode, tokens, planner, ptx_machine)


@pytest.mark.parametrize("name", ["w4a8", "w3a8"])
def test_largest_tile(name: str, planner: Planner, ptx_machine: PtxMachine) -> None:
    mode = next(mode for mode in MODES if mode.name == name)
    check(mode, 65, planner, ptx_machine, Tactic(block_rows=128))


def test_every_kernel_of_the_list_is_in_the_ptx(ptx_machine: PtxMachine) -> None:
    names = ptx_machine.file.names
    assert len(names) == len(set(names)) == 92


def test_the_combinations_launch_every_kernel(planner: Planner, ptx_machine: PtxMachine) -> None:
    """A kernel that ships and that no case above reaches would be unverified."""
    launched = set()
    for mode, tokens in COMBINATIONS:
        problem = problem_of(random_layer(mode, *shape_for(mode, tokens)), tokens, mode.dtype)
        launched |= {launch.name for launch in planner.launches(problem, Buffers(), Tactic())}
    assert launched == set(ptx_machine.file.names)
