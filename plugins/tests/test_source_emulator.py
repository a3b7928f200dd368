"""Rung 2: the kernel source under random scheduling, against the float64 reference."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from emulator.plan import Buffers, Planner, Tactic
from emulator.session import problem_of, run_linear
from emulator.source import SourceMachine
from prepack.floats import Dtype, rounded
from prepack.reference import qe_linear
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.forced import cluster_args, forced_slices, main_args
from tests.modes import (
    CLUSTER_CASES,
    CLUSTER_IDS,
    COMBINATION_IDS,
    COMBINATIONS,
    MODES,
    TOKENS,
    cluster_shape,
    cluster_tactic,
    shape_for,
    tactic_for,
)

SEEDS = range(1, 21)
THREE_BITS = [mode for mode in MODES if mode.name in ("w3a8", "w3a8_g64")]


def few_seeds(mode: Mode) -> range:
    """For every combination: four of them or more (3-bit weights: two) share each kernel at each token count.

    That makes 20 schedules of it.
    """
    return range(1, 11 if mode.weight_bits == 3 else 6)


def check(
    mode: Mode,
    tokens: int,
    seeds: range,
    planner: Planner,
    machine: SourceMachine,
    *,
    shape: tuple[int, int] | None = None,
    tactic: Tactic | None = None,
) -> None:
    """Right under one schedule, and the same bits under all others."""
    k, n = shape or shape_for(mode, tokens)
    layer, x = random_layer(mode, k, n, seed=tokens), random_tokens(mode, tokens, k)
    first: NDArray[np.float32] | None = None
    for seed in seeds:
        outcome = run_linear(machine, planner, layer, x, mode.dtype, seed=seed, tactic=tactic or tactic_for(tokens))
        assert outcome.errors == []
        if first is None:
            first = outcome.y
            assert relative_error(first, qe_linear(layer, x, mode.dtype)) <= LIMIT[mode.dtype]
        assert np.array_equal(first, outcome.y)


@pytest.mark.parametrize("tokens", [*TOKENS, 40])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_matches_reference_under_every_schedule(
    mode: Mode, tokens: int, planner: Planner, preempting_machine: SourceMachine
) -> None:
    check(mode, tokens, SEEDS, planner, preempting_machine)


@pytest.mark.parametrize(("mode", "tokens"), COMBINATIONS, ids=COMBINATION_IDS)
def test_every_combination(mode: Mode, tokens: int, planner: Planner, preempting_machine: SourceMachine) -> None:
    check(mode, tokens, few_seeds(mode), planner, preempting_machine)


def test_the_combinations_schedule_every_kernel_often_enough(planner: Planner) -> None:
    schedules: Counter[tuple[str, int]] = Counter()
    for mode, tokens in COMBINATIONS:
        problem = problem_of(random_layer(mode, *shape_for(mode, tokens)), tokens, mode.dtype)
        for launch in planner.launches(problem, Buffers(counters=256), tactic_for(tokens)):
            schedules[launch.name, tokens] += len(few_seeds(mode))
    assert min(schedules.values()) >= len(SEEDS)


def test_every_product_meets_factors_of_every_width(planner: Planner) -> None:
    """Their width is a branch inside the kernels: those of 4-bit weights take every one at every token count."""
    met: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    for mode, tokens in COMBINATIONS:
        problem = problem_of(random_layer(mode, *shape_for(mode, tokens)), tokens, mode.dtype)
        met[planner.launches(problem, Buffers(counters=256), tactic_for(tokens))[-1].name, tokens].add(
            problem.adapter_bits
        )
    for (kernel, tokens), widths in met.items():
        assert len(widths) >= (2 if "w3" in kernel else 3), (kernel, tokens)
    for kernel in {kernel for kernel, _ in met}:
        assert 4 in set().union(*(widths for (name, _), widths in met.items() if name == kernel))


CLUSTER_SEEDS = range(1, 6)  # a kernel has four numbers of tokens: 20 schedules


@pytest.mark.parametrize(("mode", "tokens"), CLUSTER_CASES, ids=CLUSTER_IDS)
def test_clusters(mode: Mode, tokens: int, planner: Planner, preempting_machine: SourceMachine) -> None:
    shape, tactic = cluster_shape(mode, tokens), cluster_tactic(mode, tokens)
    check(mode, tokens, CLUSTER_SEEDS, planner, preempting_machine, shape=shape, tactic=tactic)


def test_the_cases_of_clusters_reach_every_branch(planner: Planner) -> None:
    """Every one is a single launch of clusters, every kernel has 20 schedules, and every way to cut a layer occurs."""
    schedules, cuts = Counter[str](), set[tuple[str, int]]()
    for mode, tokens in CLUSTER_CASES:
        problem = problem_of(random_layer(mode, *cluster_shape(mode, tokens)), tokens, mode.dtype)
        (launch,) = planner.launches(problem, Buffers(), cluster_tactic(mode, tokens))
        schedules[launch.name] += len(CLUSTER_SEEDS)
        args = cluster_args(launch)
        corrects = args.shared_tiles + args.routed_tiles > 0
        copies = 10 * args.factor_bits + args.copies_down if args.shared_tiles else 0
        cuts |= {
            ("blocks", launch.cluster), ("tokens", args.M), ("experts", args.E), ("own maxima", args.own_maxima),
            ("score warps", args.score_warps), ("parts of a tile", args.tile_parts), ("copies of factors", copies),
            ("parts with a correction" if corrects else "parts", min(args.parts, 2)),
            ("sets of a block", -(-args.cluster_sets // launch.cluster)), ("longer clusters", args.longer_clusters),
            ("a shorter last slice", args.chunks % args.slice_chunks > 0),
            ("several sets of a warp", args.cluster_sets * args.parts > args.main_warps),
        }  # fmt: skip
    assert len(schedules) == 24
    assert min(schedules.values()) >= len(SEEDS)
    wanted = {
        "blocks": (2, 4, 8), "tokens": (1, 2, 3, 4), "experts": (0, 2, 4, 8, 16), "own maxima": (0, 1),
        "score warps": (1, 2), "parts of a tile": (1, 2, 4), "copies of factors": (40, 41, 80, 81, 160),
        "parts": (1, 2), "parts with a correction": (1, 2), "sets of a block": (1, 2), "longer clusters": (0, 1),
        "a shorter last slice": (False, True), "several sets of a warp": (False, True),
    }  # fmt: skip
    assert cuts >= {(what, value) for what, values in wanted.items() for value in values}


@pytest.mark.parametrize(("tokens", "slices"), [(1, 8), (4, 3), (16, 2), (40, 3)])
@pytest.mark.parametrize("mode", [MODES[0], MODES[2], MODES[6], MODES[12], *THREE_BITS], ids=lambda mode: mode.name)
def test_slices_of_k(mode: Mode, tokens: int, slices: int, planner: Planner, preempting_machine: SourceMachine) -> None:
    """Blocks that share columns meet in whichever comes last, with the same bits, and leave their counters at zero."""
    k = 1160 if mode.group_size < 0 else 1152
    layer, x = random_layer(mode, k, 72), random_tokens(mode, tokens, k)
    runs = [
        run_linear(preempting_machine, forced_slices(planner, slices), layer, x, mode.dtype, seed=seed)
        for seed in (1, 2, 3)
    ]
    assert [run.errors for run in runs] == [[], [], []]
    assert all(np.array_equal(runs[0].y, run.y) for run in runs)
    assert relative_error(runs[0].y, qe_linear(layer, x, mode.dtype)) <= LIMIT[mode.dtype]


@pytest.mark.parametrize("tokens", [3, 4])
def test_slices_where_shared_memory_is_too_small(tokens: int, planner: Planner, source_machine: SourceMachine) -> None:
    """16-bit x of all of K does not fit a block. Without counters the blocks do not quantize x themselves."""
    mode = Mode("long", act_bits=0, rank_shared=16, experts=4)
    layer, x = random_layer(mode, 18944, 40), random_tokens(mode, tokens, 18944)
    problem = problem_of(layer, tokens, "f16")
    main, alone = (planner.launches(problem, Buffers(counters=at), Tactic())[-1] for at in (256, 0))
    assert (main.name, main_args(main).k_splits) == ("qe_decode_h_cz_t8_f16", 2)
    assert (alone.name, main_args(alone).k_splits) == ("qe_decode_h_cz_t16_f16", 1)
    outcome = run_linear(source_machine, planner, layer, x, "f16")
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, "f16")) <= LIMIT["f16"]


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_more_ranks_than_threads(tokens: int, experts: int, planner: Planner, source_machine: SourceMachine) -> None:
    """A short K leaves a block of decode with one warp, which collects all of h."""
    mode = Mode("ranks", rank_shared=128, experts=experts)
    layer, x = random_layer(mode, 128, 40), random_tokens(mode, tokens, 128)
    outcome = run_linear(source_machine, planner, layer, x, "f16")
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, "f16")) <= LIMIT["f16"]


@pytest.mark.parametrize("multiprocessors", [1, 2, 3, 200])
@pytest.mark.parametrize("tokens", [2, 12, 33])
def test_gpus_of_every_size(tokens: int, multiprocessors: int, planner: Planner, source_machine: SourceMachine) -> None:
    layer, x = random_layer(MODES[0], 648, 328), random_tokens(MODES[0], tokens, 648)
    tactic = Tactic(multiprocessors=multiprocessors)
    outcome = run_linear(source_machine, planner, layer, x, "f16", tactic=tactic)
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, "f16")) <= LIMIT["f16"]


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("mode", [MODES[0], MODES[4], MODES[6], *THREE_BITS], ids=lambda mode: mode.name)
def test_every_prefill_tactic(mode: Mode, rows: int, planner: Planner, source_machine: SourceMachine) -> None:
    k = 520 if mode.group_size < 0 else 640
    layer, x = random_layer(mode, k, 136), random_tokens(mode, 130, k)
    outcome = run_linear(source_machine, planner, layer, x, "f16", tactic=Tactic(block_rows=rows))
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, "f16")) <= LIMIT["f16"]


@pytest.mark.parametrize("mode", [MODES[12], *THREE_BITS], ids=lambda mode: mode.name)
@pytest.mark.parametrize("warps", [2, 4, 8])
def test_every_decode_tactic(warps: int, mode: Mode, planner: Planner, source_machine: SourceMachine) -> None:
    layer, x = random_layer(mode, 1152, 72), random_tokens(mode, 3, 1152)
    outcome = run_linear(source_machine, planner, layer, x, "f16", tactic=Tactic(decode_warps=warps))
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, "f16")) <= LIMIT["f16"]


@pytest.mark.parametrize("tokens", [5, 17])
@pytest.mark.parametrize("group_size", [-1, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "size", "bits"),
    [("f16", 1e-4, 4), ("f16", 20.0, 4), ("bf16", 1e-30, 4), ("bf16", 1e30, 4), ("f16", 1e-4, 3), ("f16", 20.0, 3)],
)
def test_no_size_of_x_is_lost(
    dtype: Dtype, size: float, bits: int, group_size: int, tokens: int, planner: Planner, source_machine: SourceMachine
) -> None:
    """16-bit activations travel in units of their token; a mean that is not zero makes the zero points' share large."""
    mode = Mode(
        "a16", act_bits=0, group_size=group_size, zeros=True, weight_bits=bits, dtype=dtype, experts=0, rank_shared=0,
        bias=False, inv_omega=False,
    )  # fmt: skip
    layer = random_layer(mode, 640, 40)
    x = rounded(np.abs(np.random.default_rng(1).standard_normal((tokens, 640))) * size, dtype)
    outcome = run_linear(source_machine, planner, layer, x, dtype)
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, dtype)) <= LIMIT[dtype]


@pytest.mark.parametrize("tokens", [5, 17])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("act_bits", [8, 6])
def test_outliers_leave_the_sums_of_two_groups_exact_enough(
    act_bits: int, zeros: bool, tokens: int, planner: Planner, source_machine: SourceMachine
) -> None:
    """Where outliers leave the rest of x a step or two, sums are small beside the start value that two groups share."""
    mode = Mode(
        "outliers", act_bits=act_bits, group_size=64, zeros=zeros, experts=0, rank_shared=0, bias=False, inv_omega=False
    )
    layer = random_layer(mode, 2048, 40)
    spread = np.random.default_rng(1).standard_normal((tokens, 2048))
    spread[:, ::256] *= 60
    x = rounded(spread, "f16")
    outcome = run_linear(source_machine, planner, layer, x, "f16")
    assert outcome.errors == []
    assert relative_error(outcome.y, qe_linear(layer, x, "f16")) <= LIMIT["f16"]


@pytest.mark.parametrize("tokens", [3, 40])
def test_ties_and_non_finite_scores(tokens: int, planner: Planner, source_machine: SourceMachine) -> None:
    """Equal scores choose the lowest index; a token whose scores overflow goes to expert 0."""
    mode = Mode("ties", inv_omega=False, experts=4)
    layer, x = random_layer(mode, 264, 40), random_tokens(mode, tokens, 264)
    router = layer.router
    assert router is not None
    router[:, 2] = router[:, 1] = router[:, 1] * np.float32(0.25)  # experts 1 and 2 tie and win
    router[5, 3] = np.inf  # and no finite score is left when channel 5 is not zero
    x[:, 5] = 0
    x[0, 5] = 1
    outcome = run_linear(source_machine, planner, layer, x, "f16")
    with np.errstate(invalid="ignore"):
        reference = qe_linear(layer, x, "f16")
    assert outcome.errors == []
    assert relative_error(outcome.y, reference) <= LIMIT["f16"]
