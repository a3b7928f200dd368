"""What the PTX emulator's memory notices, whichever of two blocks comes first, and what blocks in step do not share."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.plan import Planner
from emulator.ptx import PtxMachine
from emulator.ptx_memory import GlobalMemory, SharedMemory
from emulator.session import run_linear
from tests.cases import random_layer, random_tokens
from tests.modes import MODES, shape_for

FIRST, SECOND = np.array([3]), np.array([4])
WORD = np.ones((1, 4), np.uint8)


@pytest.mark.parametrize("order", ["read first", "write first"])
def test_a_block_must_not_read_what_another_writes(order: str) -> None:
    errors: list[str] = []
    memory = GlobalMemory()
    at = np.array([memory.add(np.zeros(4, np.uint32), "workspace", writable=True)])
    memory.start_launch()
    memory.write(at, WORD, FIRST, np.array([0]), errors.append)
    memory.start_launch()  # a new launch may read what the last one wrote
    if order == "read first":
        memory.read(at, 4, SECOND, errors.append)
        assert errors == []
        memory.write(at, WORD, FIRST, np.array([0]), errors.append)
    else:
        memory.write(at, WORD, FIRST, np.array([0]), errors.append)
        assert errors == []
        memory.read(at, 4, SECOND, errors.append)
    assert len(errors) == 1 and "another block" in errors[0]


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
