"""Warps as numpy vectors: registers, divergence, and how operands are read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_text import Kernel, PtxError

if TYPE_CHECKING:
    from emulator.ptx_blocks import Blocks

LANES = 32
NOTHING, CLUSTER, BOX, BLOCK = 0, 1, 2, 3  # what a lane waits for; BLOCK + n is the barrier of group n
MOST_BLOCKS = 16  # that run in step: beyond it the work grows with the lanes
_MOST_LOOKS = 4096

Lanes = NDArray[Any]
Mask = NDArray[np.bool_] | None  # None: all lanes
Reader = Callable[["Warp"], Lanes]
Writer = Callable[["Warp", Lanes, Mask], None]


class DeadlockError(Exception):
    """A block that never ends; the message says why."""


class Warp:
    """The warps of one index in all blocks that run in step: registers and program counters of ``32 * blocks`` lanes.

    While all running lanes agree, `pc` counts; once they diverge, `lane_pc` does. Divergence follows the lowest program
    counter first, which reconverges the structured code that nvcc emits.
    """

    def __init__(self, blocks: Blocks, index: int) -> None:
        self.blocks, self.index = blocks, index
        self.lanes = np.arange(LANES * blocks.count)
        self.slot = self.lanes // LANES  # which of the blocks
        self.thread = index * LANES + self.lanes % LANES
        self.registers: dict[str, Lanes] = {}
        self.pc = 0
        self.lane_pc: NDArray[np.int64] | None = None
        self.running: Mask = None  # neither returned nor at a barrier
        self.can_run = True
        self.waiting = np.zeros(self.lanes.size, np.int8)  # for what
        self._resume_at = np.zeros(self.lanes.size, np.int64)
        self.committed = np.zeros(self.lanes.size, np.int64)  # groups of asynchronous copies
        self.copies: list[Copies] = []
        self.waited = np.full(self.lanes.size, not blocks.overlap)  # for the launch in front
        self._looks = 0

    @property
    def left(self) -> NDArray[np.bool_]:
        """In which blocks all lanes have returned."""
        here = np.ones(self.lanes.size, bool) if self.running is None else self.running | (self.waiting != NOTHING)
        return np.asarray(~here.reshape(-1, LANES).any(axis=1))

    def look(self) -> None:
        """Count looks at what other blocks write. A thread that looks often waits for a block that may not run yet.

        Raises DeadlockError after thousands of them.
        """
        self._looks += 1
        if self._looks > _MOST_LOOKS:
            raise DeadlockError("deadlock: a block waits for another block")

    def where(self) -> tuple[int, Mask]:
        """The next program counter and the lanes that stand there."""
        if self.lane_pc is None:
            return self.pc, self.running
        standing = self.lane_pc if self.running is None else self.lane_pc[self.running]
        pc = int(standing.min())
        mask = self.lane_pc == pc
        return pc, mask if self.running is None else mask & self.running

    def goto(self, target: int, mask: Mask) -> None:
        """Send the lanes that `where` named to the target; note when all agree again."""
        if self.lane_pc is None:
            self.pc = target
            return
        self.lane_pc[self.lanes_of(mask)] = target
        self._reconverge()

    def split(self, target: int, mask: Mask, other: int, active: Mask) -> None:
        """Send the lanes of `mask` to the target, but those of `active` to the other one."""
        if self.lane_pc is None:
            self.lane_pc = np.full(self.lanes.size, self.pc)
        self.lane_pc[self.lanes_of(mask)] = target
        self.lane_pc[self.lanes_of(active)] = other
        self._reconverge()

    def stop(self, mask: Mask) -> None:
        """These lanes run no further."""
        going = np.ones(self.lanes.size, bool) if self.running is None else self.running.copy()
        going[self.lanes_of(mask)] = False
        self.running, self.can_run = going, bool(going.any())
        if self.can_run and self.lane_pc is not None:
            self._reconverge()

    def wait(self, target: int, mask: Mask, what: int | NDArray[np.int8] = BLOCK) -> None:
        """These lanes stop until `resume`, and go on at the target then."""
        lanes = self.lanes_of(mask)
        self.waiting[lanes] = what
        self._resume_at[lanes] = target
        self.stop(mask)

    def resume(self, lanes: NDArray[np.bool_], what: int) -> None:
        """Those of these lanes that wait for this go on."""
        lanes = lanes & (self.waiting == what)
        if lanes.any():
            if self.lane_pc is None:
                self.lane_pc = np.full(self.lanes.size, self.pc)
            self.lane_pc[lanes] = self._resume_at[lanes]
            self.waiting[lanes] = NOTHING
            running = lanes if self.running is None else lanes | self.running
            self.running, self.can_run = None if running.all() else running, True
            self._reconverge()

    def _reconverge(self) -> None:
        if self.lane_pc is not None:
            running = self.lane_pc if self.running is None else self.lane_pc[self.running]
            if (running == running[0]).all():
                self.pc, self.lane_pc = int(running[0]), None

    def lanes_of(self, mask: Mask) -> NDArray[np.int64]:
        """The indices of the lanes in a mask."""
        return self.lanes if mask is None else self.lanes[mask]

    def together(self, mask: Mask, what: str) -> None:
        """Report lanes of one warp that do not execute together what a whole warp must."""
        if mask is not None:
            warps = mask.reshape(-1, LANES)
            if (warps.any(axis=1) & ~warps.all(axis=1)).any():
                self.blocks.report(f"{what}: lanes diverge")


@dataclass
class Copies:
    """Asynchronous copies of one instruction: their lanes, the group of each, and what will land where."""

    lanes: NDArray[np.int64]
    group: NDArray[np.int64]
    at: NDArray[np.int64]
    values: NDArray[np.uint8]


def _as_type(values: Lanes, wanted: type[Any]) -> Lanes:
    """Reinterpret bits; keep the low ones when the wanted type is narrower."""
    have, want = values.dtype, np.dtype(wanted)
    if have == want:
        return values
    if have.itemsize == want.itemsize and np.bool_ not in (want, have):
        return values.view(want)
    if np.bool_ in (have, want):
        return values.astype(want)
    return values.view(f"u{have.itemsize}").astype(f"u{want.itemsize}").view(want)


def reader(kernel: Kernel, operand: str, wanted: type[Any]) -> Reader:
    """How to fetch an operand as a type."""
    if operand in kernel.registers:
        kind = kernel.registers[operand]

        def read_register(warp: Warp) -> Lanes:
            values = warp.registers.get(operand)
            if values is None:
                warp.blocks.report(f"register {operand} is read before it is written")
                values = np.zeros(warp.lanes.size, kind)
            return _as_type(values, wanted)

        return read_register
    if operand.startswith("%"):
        return lambda warp: _as_type(warp.blocks.special(operand, warp), wanted)
    if operand in kernel.symbols or operand == kernel.parameter:  # both spaces start at their only symbol
        return lambda warp: np.zeros(warp.lanes.size, wanted)
    constant = np.full(LANES * MOST_BLOCKS, _constant(operand, wanted))
    return lambda warp: constant[: warp.lanes.size]


def _constant(operand: str, wanted: type[Any]) -> Any:  # noqa: ANN401 - a scalar of the wanted type
    if operand.startswith("0f"):
        return np.array(int(operand[2:], 16), np.uint32).view(np.float32)
    try:
        value = int(operand.rstrip("U"), 0)
    except ValueError:
        raise PtxError(f"unknown operand {operand}") from None
    if np.dtype(wanted) == np.bool_:
        return bool(value)
    bits = np.dtype(wanted).itemsize * 8
    return np.array(value & ((1 << bits) - 1), f"u{bits // 8}").view(wanted)


def writer(kernel: Kernel, operand: str) -> Writer:
    """How to store into a register, sign- or zero-extending narrower values."""
    kind = kernel.registers[operand]
    size = np.dtype(kind).itemsize

    def write(warp: Warp, values: Lanes, mask: Mask) -> None:
        if values.dtype != kind:
            if values.dtype.itemsize != size and values.dtype.kind in "iu":
                values = values.astype(f"{values.dtype.kind}{size}")
            values = _as_type(values, kind)
        if mask is None:
            warp.registers[operand] = values
        else:
            old = warp.registers.get(operand)
            warp.registers[operand] = np.where(mask, values, np.zeros(len(mask), kind) if old is None else old)

    return write
