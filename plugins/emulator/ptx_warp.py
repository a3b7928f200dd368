"""One warp as 32-wide numpy vectors: registers, divergence, and how operands are read and written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_text import Kernel, PtxError

if TYPE_CHECKING:
    from emulator.ptx import Block

LANES = 32
LANE = np.arange(LANES)

Lanes = NDArray[Any]
Mask = NDArray[np.bool_] | None  # None: all lanes
Reader = Callable[["Warp"], Lanes]
Writer = Callable[["Warp", Lanes, Mask], None]


class Warp:
    """Registers and program counters. While all lanes agree, `pc` counts; once they diverge, `lane_pc` does.

    Divergence follows the lowest program counter first, which reconverges the structured code that nvcc emits.
    """

    def __init__(self, block: Block, index: int) -> None:
        self.block, self.index = block, index
        self.thread = index * LANES + LANE
        self.registers: dict[str, Lanes] = {}
        self.pc = 0
        self.lane_pc: NDArray[np.int64] | None = None
        self.alive = np.ones(LANES, bool)
        self.at_barrier = self.done = False
        self.open_copies: list[Any] = []
        self.copy_groups: list[list[Any]] = []

    def where(self) -> tuple[int, Mask]:
        """The next program counter and the lanes that stand there."""
        if self.lane_pc is None:
            return self.pc, None
        pc = int(self.lane_pc[self.alive].min())
        return pc, self.alive & (self.lane_pc == pc)

    def goto(self, target: int, mask: Mask) -> None:
        """Send these lanes to the target; note when all agree again."""
        if self.lane_pc is None:
            if mask is None:
                self.pc = target
                return
            self.lane_pc = np.full(LANES, self.pc)
        self.lane_pc[self.alive if mask is None else mask] = target
        living = self.lane_pc[self.alive]
        if self.alive.all() and (living == living[0]).all():
            self.pc, self.lane_pc = int(living[0]), None

    def leave(self, mask: Mask) -> None:
        """These lanes return from the kernel."""
        self.alive = self.alive & (False if mask is None else ~mask)
        self.done = not self.alive.any()
        if not self.done and self.lane_pc is None:
            self.lane_pc = np.full(LANES, self.pc)


def lanes_of(mask: Mask) -> NDArray[np.int64]:
    """The indices of the lanes in a mask."""
    return LANE if mask is None else LANE[mask]


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
                warp.block.report(f"register {operand} is read before it is written")
                values = np.zeros(LANES, kind)
            return _as_type(values, wanted)

        return read_register
    if operand.startswith("%"):
        return lambda warp: _as_type(warp.block.special(operand, warp), wanted)
    if operand in kernel.symbols or operand == kernel.parameter:  # both spaces start at their only symbol
        return lambda _: np.zeros(LANES, wanted)
    constant = np.full(LANES, _constant(operand, wanted))
    return lambda _: constant


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
            warp.registers[operand] = np.where(mask, values, np.zeros(LANES, kind) if old is None else old)

    return write
