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

THREADS = 128
SEEDS = range(1, 11)
LEFT = "cluster barrier: some threads have already left the kernel"
APART = "cluster barrier: the lanes of a warp are at different barriers"
NO_BOX = "message: no box is open there"
NOT_OPEN = "message: its box may not be open yet, because no cluster barrier came after its opening"
ENDS = "box: its block ends without a wait for it, and peers may still write into the block"
ENDED = "message: its block has ended"
TWO_MESSAGES = "message: race with another message"
OVER_WRITE = "message: race with a write"
OVER_READ = "message: race with a read"
UNREAD = "shared memory: read of bytes of a message before its box was waited for"
OVER_MESSAGE = "shared memory: race of a write with a message"
COPYING = "shared memory: access to bytes that an asynchronous copy still owns"
OVER_COPY = "message: over bytes that an asynchronous copy still owns"
UNORDERED = "box: a thread waits for it, and no barrier came after its opening"
UNOPENED = "box: a thread waits for one that is not open"
NOBODY = "shared memory: read of bytes that nobody wrote"
LATE_READ = "shared memory: race of a read with a write"
OVERREAD = "shared memory: race of a write with a read"
GROUP_APART = "group barrier: the lanes of a warp are at different barriers"
GROUP_WAITS = "group barrier: some threads of the group never reach it"

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
    "peers:not_begun": ({NOT_OPEN, NO_BOX}, {UNORDERED, UNOPENED}),
    "own:not_begun": ({NOT_OPEN, NO_BOX}, {UNORDERED, UNOPENED}),
    "no_fence": ({"message: its box may not be open yet, because no fence came after its opening"}, set()),
    "no_box": ({NO_BOX}, set()),
    "ends": ({ENDS}, {ENDED}),
    "read_early": ({UNREAD}, {NOBODY, OVER_READ}),
    "other_box": ({UNREAD}, {NOBODY, OVER_READ}),
    "one_waits": ({UNREAD}, {NOBODY, OVER_READ}),
    "other_group_waits": ({UNREAD}, {NOBODY, OVER_READ}),
    "peers:two_messages": ({TWO_MESSAGES}, set()),
    "own:two_messages": ({TWO_MESSAGES}, set()),
    "peers:no_round": ({TWO_MESSAGES, OVER_READ}, {UNREAD}),
    "own:no_round": ({OVER_READ, UNREAD}, set()),
    "peers:write": ({OVER_WRITE, OVER_MESSAGE}, set()),
    "own:write": ({OVER_WRITE, OVER_MESSAGE}, set()),
    "write_late": ({OVER_WRITE, OVER_MESSAGE}, set()),
    "peers:write_after": ({OVER_WRITE, OVER_MESSAGE}, set()),
    "own:write_after": ({OVER_WRITE, OVER_MESSAGE}, set()),
    "peers:read": ({OVER_READ, UNREAD}, set()),
    "own:read": ({OVER_READ, UNREAD}, set()),
    "copy": ({OVER_COPY, OVER_MESSAGE}, {COPYING}),
    "copy_late": ({OVER_COPY, OVER_MESSAGE}, {COPYING}),
    "own:told_of_wait": ({UNREAD}, set()),
    "own:told_of_read": ({OVERREAD}, set()),
    "own:told_to_send": ({TWO_MESSAGES}, set()),
    "peers:told_to_send": ({TWO_MESSAGES}, set()),
    "box_twice": ({"box: it is opened twice"}, set()),
    "box_misaligned": ({"box: misaligned"}, set()),
    "box_out_of_bounds": ({"box: out of bounds of shared memory"}, set()),
    "box_negative": ({"box: it cannot expect that many bytes"}, set()),
    "box_too_large": ({"box: it cannot expect that many bytes"}, set()),
    "box_read": ({"shared memory: a box is read or written like other memory"}, set()),
    "wait_not_open": ({UNOPENED}, set()),
    "wait_unordered": ({UNORDERED, UNOPENED}, set()),
    "too_many": ({"message: its box gets more bytes than it expects"}, set()),
    "never_full": ({"deadlock: a box that never gets all bytes that it expects"}, set()),
    "over_box": ({"message: over a box"}, {"message: its box gets more bytes than it expects"}),
    "no_such_block": ({"message: the cluster has no such block"}, set()),
    "out_of_bounds": ({"message: out of bounds of shared memory"}, set()),
    "misaligned": ({"message: misaligned"}, set()),
    "misaligned_four": ({"message: misaligned"}, set()),
    "fence_early": ({"global memory: read of partial that another block writes in the same launch"}, set()),
    "own_memory_early": ({LATE_READ, OVERREAD}, {NOBODY}),
    "group_zero": ({"group barrier: groups have the numbers 1 to 15"}, set()),
    "group_sixteen": ({"group barrier: groups have the numbers 1 to 15"}, set()),
    "group_half_warp": ({"group barrier: a group has whole warps, and no more than its block"}, set()),
    "group_of_two_blocks": ({"group barrier: a group has whole warps, and no more than its block"}, set()),
    "two_groups": ({"group barrier: a warp is in two groups"}, set()),
    "group_disagrees": ({"group barrier: its threads disagree about how many they are"}, set()),
    "group_too_large": ({"group barrier: more threads than the group has"}, set()),
    "group_lanes_apart": ({GROUP_APART}, set()),
    "groups_of_lanes": ({GROUP_APART}, set()),
    "group_lane_waits": ({GROUP_APART}, set()),
    "group_left": ({GROUP_WAITS}, set()),
    "group_waits": ({GROUP_WAITS}, set()),
    "no_group_sync": ({LATE_READ, OVERREAD}, {NOBODY}),
    "other_group": ({LATE_READ, OVERREAD}, {NOBODY}),
    "other_group_reads": ({OVERREAD}, {LATE_READ}),
    "other_group_wrote": ({LATE_READ}, {OVERREAD}),
}
REACHES = ["", "peers", "own"]  # where messages go
RIGHT = ["right", "fence", "own_memory", "groups", "peek"]
CASES = list(dict.fromkeys([*RIGHT, *(name.rpartition(":")[2] for name in MISTAKES)]))  # as in cluster_kernels.cu


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
    reach, _, what = case.rpartition(":")
    args = struct.pack("<4Q4i", x, y, partial, counter, CASES.index(what), size, REACHES.index(reach), 0)
    launch = Launch(
        kernel=b"cluster_test", grid_x=blocks, grid_y=1, threads=THREADS, cluster=size,
        shared_bytes=8 * THREADS * size + 64, args_bytes=len(args), args=(type(Launch().args))(*args),
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


def test_groups_meet_without_the_rest_of_the_block(machine: SourceMachine) -> None:
    t = np.arange(THREADS)
    expected = 4 * (t ^ 33) + 6 + (t ^ 64) + 2  # of four turns, and of the third one once more
    for seed in SEEDS:
        outcome = run(machine, "groups", seed)
        assert outcome.errors == set()
        assert np.array_equal(outcome.y, np.tile(expected, (8, 1)))


def test_messages_land_late_and_in_any_order(machine: SourceMachine) -> None:
    """Of those that were sent, read from the last to the first, some are not there and later ones are."""
    came = [run(machine, "peek", seed, blocks=2, size=2) for seed in range(1, 41)]
    landed = [outcome.y[0, :16] == 1 for outcome in came if NOBODY not in outcome.errors]
    assert any(some.all() for some in landed) and any(not some.any() for some in landed)
    assert any((~some[: some.nonzero()[0].max()]).any() for some in landed if some.any())


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
