"""What the PTX emulator's memory notices, whichever of two blocks comes first, and what blocks in step do not share."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.plan import Planner
from emulator.ptx import PtxMachine
from emulator.ptx_memory import GlobalMemory, SharedMemory, Threads
from emulator.session import run_linear
from tests.cases import random_layer, random_tokens
from tests.modes import MODES, shape_for


def thread(block: int, epoch: int = 1, *, waited: bool = True) -> Threads:
    """The first thread of a block."""
    return Threads(np.array([block]), np.array([0]), np.array([waited]), epoch)


FIRST, SECOND = thread(3), thread(4)
WORD = np.ones((1, 4), np.uint8)


@pytest.mark.parametrize("order", ["read first", "write first"])
def test_a_block_must_not_read_what_another_writes(order: str) -> None:
    errors: list[str] = []
    memory = GlobalMemory()
    at = np.array([memory.add(np.zeros(4, np.uint32), "workspace", writable=True)])
    memory.start_launch()
    memory.write(at, WORD, FIRST, errors.append)
    memory.start_launch()  # a new launch may read what the last one wrote
    if order == "read first":
        memory.read(at, 4, SECOND, errors.append)
        assert errors == []
        memory.write(at, WORD, FIRST, errors.append)
    else:
        memory.write(at, WORD, FIRST, errors.append)
        assert errors == []
        memory.read(at, 4, SECOND, errors.append)
    assert len(errors) == 1 and "another block" in errors[0]


class Meeting:
    """Block 3 writes a word, fences it off and counts; block 4 counts, fences and reads. Each step may be left out."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.memory = GlobalMemory()
        self.word, self.counter = (
            np.array([self.memory.add(np.zeros(1, np.uint32), name, writable=True, zeroed=True)])
            for name in ("sums", "counters")
        )
        self.memory.start_launch()

    def write(self, *, barrier: bool = True, fence: bool = True, other_counter: bool = False) -> None:
        at = self.counter + 4 * other_counter
        self.memory.write(self.word, WORD, FIRST, self.errors.append)
        if fence:
            self.memory.known.fence(3, 1 + barrier)
        self.memory.known.count(int(at[0]), 3)

    def read(self, *, counts: bool = True, fence: bool = True, fresh: bool = True) -> list[str]:
        if counts:
            self.memory.count_up(self.counter, 1, SECOND, self.errors.append)
        if fence:
            self.memory.known.fence(4, 1)
        self.memory.read(self.word, 4, SECOND, self.errors.append, fresh=fresh)
        return self.errors


def test_a_counter_passes_on_what_was_fenced_off() -> None:
    meeting = Meeting()
    meeting.write()
    assert meeting.read() == []


@pytest.mark.parametrize("missing", ["barrier", "fence"])
def test_a_writer_needs_barrier_and_fence(missing: str) -> None:
    meeting = Meeting()
    meeting.write(**{missing: False})
    assert "another block" in meeting.read()[0]


@pytest.mark.parametrize("missing", ["counts", "fence", "fresh"])
def test_a_reader_needs_counter_fence_and_a_fresh_read(missing: str) -> None:
    meeting = Meeting()
    meeting.write()
    assert "another block" in meeting.read(**{missing: False})[0]


def test_the_counter_of_others_says_nothing() -> None:
    meeting = Meeting()
    meeting.write(other_counter=True)
    assert "another block" in meeting.read()[0]


def test_counters_begin_again_after_the_last() -> None:
    errors: list[str] = []
    memory, counter = GlobalMemory(), np.zeros(1, np.uint32)
    at = np.array([memory.add(counter, "counters", writable=True, zeroed=True)])
    memory.start_launch()
    assert [memory.count_up(at, 2, FIRST, errors.append) for _ in range(4)] == [0, 1, 2, 0]
    assert counter[0] == 1 and errors == []


@pytest.mark.parametrize(("name", "writable"), [("x", False), ("workspace", True), ("weight", False)])
def test_a_thread_waits_for_the_launch_in_front(name: str, writable: bool) -> None:
    """Not for weights."""
    errors: list[str] = []
    memory = GlobalMemory()
    at = np.array([memory.add(np.zeros(1, np.uint32), name, writable=writable, zeroed=True)])
    memory.start_launch()
    memory.read(at, 4, thread(3, waited=False), errors.append)
    assert len(errors) == (name != "weight")
    memory.read(at, 4, thread(3), errors.append)
    assert len(errors) < 2


def test_prefetches_stay_in_bounds() -> None:
    errors: list[str] = []
    memory = GlobalMemory()
    at = memory.add(np.zeros(64, np.uint8), "weight", writable=False)
    memory.prefetch(np.array([at, at + 63]), errors.append)
    assert errors == []
    memory.prefetch(np.array([at + 64]), errors.append)
    assert errors == ["global memory: prefetch out of bounds of weight"]


def test_blocks_in_step_have_shared_memory_of_their_own() -> None:
    errors: list[str] = []
    shared = SharedMemory(64, 2, errors.append)
    both, slots = np.array([16, 16]), np.array([0, 1])
    shared.write(both, np.array([[1] * 4, [2] * 4], np.uint8), 0, slots)
    assert shared.read(both, 4, 0, slots).tolist() == [[1] * 4, [2] * 4]
    assert errors == []
    shared.read(np.array([64]), 4, 0, np.array([0]))  # the other block's first byte
    assert errors == ["shared memory: read out of bounds", "shared memory: read of bytes that nobody wrote"]
    del errors[:]
    shared.read(np.array([16]), 4, 1, np.array([1]))
    assert errors == ["shared memory: race of a read with a write"]


def test_blocks_in_step_and_one_by_one_give_the_same_bits(
    planner: Planner, ptx_machine: PtxMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = MODES[0]
    k, n = shape_for(mode, 65)
    layer, x = random_layer(mode, k, n), random_tokens(mode, 65, k)
    in_step = run_linear(ptx_machine, planner, layer, x, mode.dtype)
    monkeypatch.setattr("emulator.ptx.MOST_BLOCKS", 1)
    alone = run_linear(ptx_machine, planner, layer, x, mode.dtype)
    assert in_step.errors == alone.errors == []
    assert np.array_equal(in_step.y, alone.y)
