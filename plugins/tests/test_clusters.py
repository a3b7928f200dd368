"""Rung 2: clusters on the source emulator. What is right passes, and every mistake is reported."""

from __future__ import annotations

import shutil
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from emulator.build import ROOT, source_emulator
from emulator.plan import Launch
from emulator.session import aligned
from emulator.source import SourceMachine

THREADS = 64
SEEDS = range(1, 11)
LEFT = "cluster barrier: some threads have already left the kernel"
APART = "cluster barrier: the lanes of a warp are at different barriers"
LATE_STORE = "store to a peer: race with another write"
LATE_READ = "shared memory: race of a read with a write"
PEER_READ = "shared memory: race of a read with a peer's store"
OVERWRITTEN = "store to a peer: race with a read of the peer"
ENDED = "store to a peer: the peer has ended"
MAY_END = "store to a peer: no cluster barrier afterwards keeps it from ending before"
NOBODY = "shared memory: read of bytes that nobody wrote"
TWO_WRITES = "shared memory: race of two writes"
OVERREAD = "shared memory: race of a write with a read"

# What every schedule must report one of and all schedules together all of; and what some report besides.
MISTAKES: dict[str, tuple[set[str], set[str]]] = {
    "arrive_twice": ({"cluster barrier: a thread arrives twice without a wait in between"}, set()),
    "wait_alone": ({"cluster barrier: a thread waits that did not arrive"}, set()),
    "leave_arrived": ({"cluster barrier: a thread leaves the kernel without the wait for its arrival"}, set()),
    "block_leaves": ({LEFT}, set()),
    "warp_leaves": ({LEFT}, set()),
    "lane_leaves": ({LEFT}, set()),
    "lanes_apart": ({APART}, set()),
    "sites_apart": ({APART}, set()),
    "half_at_block_barrier": ({"deadlock: a warp collective or barrier that not all threads reach"}, set()),
    "not_begun": ({"store to a peer: no cluster barrier before it shows that the peer has begun"}, set()),
    "ended": ({MAY_END}, {ENDED}),
    "read_early": ({PEER_READ, OVERWRITTEN}, {NOBODY, MAY_END, ENDED}),
    "read_between": ({PEER_READ, OVERWRITTEN}, {NOBODY}),
    "two_writers": ({LATE_STORE, TWO_WRITES}, set()),
    "own_write": ({LATE_STORE, TWO_WRITES}, set()),
    "own_read": ({OVERWRITTEN}, {PEER_READ}),
    "copy": (
        {"store to a peer: over bytes that an asynchronous copy still owns"},
        {
            "shared memory: access to bytes that an asynchronous copy still owns",
            "asynchronous copy: over bytes that another thread writes",
        },
    ),
    "no_such_block": ({"store to a peer: the cluster has no such block"}, set()),
    "out_of_bounds": ({"store to a peer: out of bounds of shared memory"}, set()),
    "misaligned": ({"store to a peer: misaligned"}, set()),
    "fence_early": ({"global memory: read of partial that another block writes in the same launch"}, set()),
    "own_memory_early": ({LATE_READ, OVERREAD}, {NOBODY}),
}
CASES = ["right", "fence", "own_memory", *MISTAKES]  # as in cluster_kernels.cu


@dataclass(frozen=True)
class Outcome:
    y: NDArray[np.float32]
    errors: set[str]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> SourceMachine:
    """The emulator with the kernels of cluster_kernels.cu instead of the ones that ship."""
    root = tmp_path_factory.mktemp("clusters") / "plugins"
    for folder in ("kernels", "include", "host", "emulator"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/cluster_kernels.cu", root / "kernels/kernels.cu")
    (root / "kernels/kernel_list.h").write_text("QE_MAIN_CLUSTER(cluster_test)\n")
    return SourceMachine(source_emulator(root), preempt_every=20)


def run(machine: SourceMachine, case: str, seed: int, *, blocks: int = 8, size: int = 4, **changes: int) -> Outcome:
    """Launch one case of cluster_kernels.cu in clusters of `size` blocks; `changes` are fields of the launch."""
    machine.clear()
    keep: list[NDArray[Any]] = []

    def add(array: NDArray[Any], name: str, *, writable: bool = True, zeroed: bool = False) -> int:
        keep.append(aligned(array))
        return machine.add(keep[-1], name, writable=writable, zeroed=zeroed)

    x = add(np.zeros(THREADS, np.float32), "x", writable=False)
    y = add(np.full((blocks, THREADS), np.nan, np.float32), "y")
    partial = add(np.zeros((blocks, THREADS), np.float32), "partial")
    counter = add(np.zeros(1, np.uint32), "counter", zeroed=True)
    args = struct.pack("<4Q2i", x, y, partial, counter, CASES.index(case), size)
    launch = Launch(
        kernel=b"cluster_test", grid_x=blocks, grid_y=1, threads=THREADS, cluster=size,
        shared_bytes=4 * THREADS * size, args_bytes=len(args), args=(type(Launch().args))(*args),
    )  # fmt: skip
    for field, value in changes.items():
        setattr(launch, field, value)
    errors = set(machine.launch(launch, seed))
    return Outcome(keep[1], errors)


@pytest.mark.parametrize(("blocks", "cluster"), [(8, 4), (6, 2), (8, 8), (3, 1)])
def test_peers_exchange(machine: SourceMachine, blocks: int, cluster: int) -> None:
    number = np.arange(blocks * THREADS, dtype=np.float32).reshape(-1, cluster, THREADS)
    expected = np.repeat(3 * (number + 1).sum(axis=1), cluster, axis=0)
    for seed in SEEDS:
        outcome = run(machine, "right", seed, blocks=blocks, size=cluster)
        assert outcome.errors == set()
        assert np.array_equal(outcome.y, expected)


def test_a_round_is_a_barrier_of_the_block(machine: SourceMachine) -> None:
    for seed in SEEDS:
        outcome = run(machine, "own_memory", seed)
        assert outcome.errors == set()
        assert np.array_equal(outcome.y, np.tile(np.roll(np.arange(THREADS), -33), (8, 1)))
        outcome = run(machine, "fence", seed)
        assert outcome.errors == set()
        assert np.array_equal(outcome.y[0], 28 + 8 * np.arange(THREADS))


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_reported(machine: SourceMachine, case: str) -> None:
    wanted, allowed = MISTAKES[case]
    found: set[str] = set()
    for seed in SEEDS:
        errors = run(machine, case, seed).errors
        assert errors & wanted
        assert errors <= wanted | allowed
        found |= errors
    assert wanted <= found


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"grid_x": 6}, "the grid is no multiple of the cluster"),
        ({"grid_x": 9, "cluster": 9}, "a cluster has 1 to 8 blocks"),
        ({"threads": 48}, "a block has 1 to 32 whole warps"),
        ({"shared_bytes": 1 << 20}, "more shared memory than any chip has"),
    ],
)
def test_launches_that_no_gpu_takes(machine: SourceMachine, changes: dict[str, int], why: str) -> None:
    assert run(machine, "right", 1, **changes).errors == {f"launch: {why}"}


def test_no_cluster_is_a_cluster_of_one_block(machine: SourceMachine) -> None:
    alone, unsaid = (run(machine, "right", 1, size=1, **changes) for changes in ({}, {"cluster": 0}))
    assert alone.errors == unsaid.errors == set()
    assert np.array_equal(alone.y, unsaid.y)
