"""Rung 3: the PTX that ships, against the float64 reference."""

from __future__ import annotations

import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from emulator.build import ROOT, ptx, source_emulator
from emulator.plan import Buffers, Planner, Tactic
from emulator.ptx import PtxMachine
from emulator.ptx_text import CLUSTER_KERNELS, PtxFile
from emulator.session import problem_of, run_linear
from prepack.reference import qe_linear
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.forced import forced_slices
from tests.modes import (
    CLUSTER_CASES,
    COMBINATIONS,
    FEWER,
    FEWER_IDS,
    MODES,
    TOKENS,
    WIDE,
    cluster_shape,
    cluster_tactic,
    shape_for,
    tactic_for,
)

SHARES = 8  # of a long list of cases, which workers of pytest take one by one


def check(mode: Mode, tokens: int, planner: Planner, machine: PtxMachine, tactic: Tactic | None = None) -> None:
    k, n = shape_for(mode, tokens)
    layer, x = random_layer(mode, k, n, seed=tokens), random_tokens(mode, tokens, k)
    outcome = run_linear(machine, planner, layer, x, mode.dtype, tactic=tactic or tactic_for(tokens))
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, mode.dtype)) <= LIMIT[mode.dtype]


def launched(planner: Planner, mode: Mode, tokens: int, tactic: Tactic | None = None) -> list[str]:
    """The kernels of one case."""
    problem = problem_of(random_layer(mode, *shape_for(mode, tokens)), tokens, mode.dtype)
    return [launch.name for launch in planner.launches(problem, Buffers(counters=256), tactic or tactic_for(tokens))]


@cache
def first_of_every_kernel() -> list[tuple[Mode, int]]:
    """Of the combinations, those that launch what none before them did."""
    planner, seen, cases = Planner.load(source_emulator()), set[str](), []
    for mode, tokens in COMBINATIONS:
        kernels = set(launched(planner, mode, tokens))
        if kernels - seen:
            cases.append((mode, tokens))
            seen |= kernels
    return cases


@pytest.mark.parametrize("tokens", [*TOKENS, 40])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_matches_reference(mode: Mode, tokens: int, planner: Planner, ptx_machine: PtxMachine) -> None:
    check(mode, tokens, planner, ptx_machine)


@pytest.mark.parametrize(("mode", "tokens"), FEWER, ids=FEWER_IDS)
def test_every_combination(mode: Mode, tokens: int, planner: Planner, ptx_machine: PtxMachine) -> None:
    check(mode, tokens, planner, ptx_machine)


@pytest.fixture(scope="module")
def machine_90() -> PtxMachine:
    """What chips from 9.0 on get: the same PTX with the instructions that its comments hold."""
    return PtxMachine(ptx(), sm_90=True)


# Every kernel at two numbers of tokens: the cases alternate between 1 and 3, and 2 and 4.
SOME_CLUSTERS = [case for i, case in enumerate(CLUSTER_CASES) if (i // 4 + i) % 2 == 0]


@pytest.mark.parametrize(
    ("mode", "tokens"), SOME_CLUSTERS, ids=[f"{mode.name}-{tokens}" for mode, tokens in SOME_CLUSTERS]
)
def test_clusters(mode: Mode, tokens: int, planner: Planner, machine_90: PtxMachine) -> None:
    layer = random_layer(mode, *cluster_shape(mode, tokens), seed=tokens)
    x = random_tokens(mode, tokens, layer.in_features)
    outcome = run_linear(machine_90, planner, layer, x, mode.dtype, seed=tokens, tactic=cluster_tactic(mode, tokens))
    assert outcome.errors == []
    assert [name.startswith(CLUSTER_KERNELS) for name in outcome.kernels] == [True]
    assert relative_error(outcome.y, qe_linear(layer, x, mode.dtype)) <= LIMIT[mode.dtype]


def test_every_kernel_of_clusters_runs(planner: Planner, machine_90: PtxMachine) -> None:
    """At two numbers of tokens."""
    found = Counter(
        launch.name
        for mode, tokens in SOME_CLUSTERS
        for launch in planner.launches(
            problem_of(random_layer(mode, *cluster_shape(mode, tokens)), tokens, mode.dtype),
            Buffers(),
            cluster_tactic(mode, tokens),
        )
    )
    assert found == {name: 2 for name in machine_90.file.names if name.startswith(CLUSTER_KERNELS)}


def test_the_text_lets_launches_overlap() -> None:
    text = ptx().read_text()
    assert all(each in text for each in ("// sm_90: griddepcontrol.wait", "// sm_90: griddepcontrol.launch_dependents"))


@pytest.mark.parametrize("share", range(SHARES))
def test_every_kernel_where_launches_overlap(share: int, planner: Planner, machine_90: PtxMachine) -> None:
    for mode, tokens in first_of_every_kernel()[share::SHARES]:
        check(mode, tokens, planner, machine_90)


def test_the_text_for_9_0_is_the_one_that_cmake_writes(tmp_path: Path) -> None:
    written = tmp_path / "kernels_sm_90.ptx"
    script = ["cmake", f"-DFROM={ptx()}", f"-DTO={written}", "-P", str(ROOT / "cmake/sm_90.cmake")]
    subprocess.run(script, check=True)
    name = "qe_decode_s8_c_t8_f16"
    shipped, emulated = PtxFile(written.read_text(), sm_90=True), PtxFile(ptx().read_text(), sm_90=True)
    assert shipped.kernel(name).code == emulated.kernel(name).code != PtxFile(ptx().read_text()).kernel(name).code


@pytest.mark.parametrize(("tokens", "k"), [(1, 1160), (4, 2056), (16, 1160)])
def test_slices_of_k(tokens: int, k: int, planner: Planner, ptx_machine: PtxMachine) -> None:
    for mode in (MODES[0], MODES[2], MODES[11]):
        layer, x = random_layer(mode, k, 72), random_tokens(mode, tokens, k)
        outcome = run_linear(ptx_machine, forced_slices(planner, 3), layer, x, mode.dtype)
        assert outcome.errors == []
        assert relative_error(outcome.y, qe_linear(layer, x, mode.dtype)) <= LIMIT[mode.dtype]


@pytest.mark.parametrize("mode", WIDE, ids=lambda mode: mode.name)
def test_largest_tile(mode: Mode, planner: Planner, ptx_machine: PtxMachine) -> None:
    check(mode, 65, planner, ptx_machine, Tactic(block_rows=128))


def test_every_kernel_of_the_list_is_in_the_ptx(ptx_machine: PtxMachine, machine_90: PtxMachine) -> None:
    names, of_clusters = ptx_machine.file.names, machine_90.file.names
    assert len(names) == len(set(names)) == 105
    assert len(of_clusters) == len(set(of_clusters)) == 129
    assert set(of_clusters) - set(names) == {name for name in of_clusters if name.startswith(CLUSTER_KERNELS)}


def test_the_combinations_launch_every_kernel(planner: Planner, ptx_machine: PtxMachine) -> None:
    """A kernel that ships and that no case above reaches would be unverified."""
    found = {name for mode, tokens in FEWER for name in launched(planner, mode, tokens)}
    found |= {name for mode in WIDE for name in launched(planner, mode, 65, Tactic(block_rows=128))}
    assert found == set(ptx_machine.file.names)
