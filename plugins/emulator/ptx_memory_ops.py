"""Loads, stores and asynchronous copies of the PTX emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_memory import Threads
from emulator.ptx_ops import Step
from emulator.ptx_text import Instruction, Kernel, PtxError, address, vector
from emulator.ptx_warp import Copies, Lanes, Mask, Reader, Warp, reader, writer


def pointer_of(kernel: Kernel, operand: str) -> Reader:
    """How to fetch the address ``[%rd1+16]``."""
    base, offset = address(operand)
    wide = kernel.registers.get(base) is np.uint64
    fetch = reader(kernel, base, np.uint64 if wide else np.uint32)
    return lambda warp: fetch(warp).astype(np.int64) + offset


def threads_of(warp: Warp, lanes: NDArray[np.int64]) -> Threads:
    """These lanes of a warp, as memory sees them."""
    return Threads(warp.blocks.number[lanes], warp.thread[lanes], warp.waited[lanes], warp.blocks.shared.epoch)


def _width(instruction: Instruction) -> tuple[type[Any], int]:
    return instruction.type, 4 if "v4" in instruction.op else 2 if "v2" in instruction.op else 1


def _load_parameter(kernel: Kernel, instruction: Instruction) -> Step:
    kind, count = _width(instruction)
    base, offset = address(instruction.operands[1])
    start = reader(kernel, base, np.int64)
    stores = [writer(kernel, register) for register in vector(instruction.operands[0])]

    def step(warp: Warp, mask: Mask) -> None:
        at = int(start(warp)[warp.lanes_of(mask)[0]]) + offset  # the argument block is the same for all lanes
        values = np.frombuffer(warp.blocks.parameters, kind, count, at)
        for store, value in zip(stores, values, strict=True):
            store(warp, np.full(warp.lanes.size, value, kind), mask)

    return step


def _load(kernel: Kernel, instruction: Instruction) -> Step:
    kind, count = _width(instruction)
    size = np.dtype(kind).itemsize * count
    pointer = pointer_of(kernel, instruction.operands[1])
    stores = [writer(kernel, register) for register in vector(instruction.operands[0])]
    shared, fresh = instruction.op[1] == "shared", instruction.op[1:4] == ("relaxed", "gpu", "global")
    if not shared and not fresh and instruction.op[1] != "global":
        raise PtxError(f"state space of `{instruction.text}`")

    def step(warp: Warp, mask: Mask) -> None:
        lanes, blocks = warp.lanes_of(mask), warp.blocks
        if fresh:
            warp.look()
        at = pointer(warp)[lanes]
        found = (
            blocks.shared.read(at, size, warp.index, warp.slot[lanes])
            if shared
            else blocks.memory.read(at, size, threads_of(warp, lanes), blocks.report, fresh=fresh)
        )
        raw = found
        if mask is not None:
            raw = np.zeros((warp.lanes.size, size), np.uint8)
            raw[lanes] = found
        values = raw.view(kind)
        for i, store in enumerate(stores):
            store(warp, np.ascontiguousarray(values[:, i]), mask)

    return step


def raw_values(kernel: Kernel, instruction: Instruction) -> Callable[[Warp], NDArray[np.uint8]]:
    """How to fetch what a store writes: a row of bytes a lane."""
    kind, _ = _width(instruction)
    sources = [reader(kernel, register, kind) for register in vector(instruction.operands[1])]

    def fetch(warp: Warp) -> NDArray[np.uint8]:
        values = np.ascontiguousarray(np.stack([source(warp) for source in sources], 1))
        return values.view(np.uint8).reshape(warp.lanes.size, -1)

    return fetch


def _store(kernel: Kernel, instruction: Instruction) -> Step:
    pointer, values = pointer_of(kernel, instruction.operands[0]), raw_values(kernel, instruction)
    shared = instruction.op[1] == "shared"

    def step(warp: Warp, mask: Mask) -> None:
        lanes, blocks = warp.lanes_of(mask), warp.blocks
        at = pointer(warp)[lanes]
        raw = values(warp)[lanes]
        if shared:
            blocks.shared.write(at, raw, warp.index, warp.slot[lanes])
        else:
            blocks.memory.write(at, raw, threads_of(warp, lanes), blocks.report)

    return step


def _land(warp: Warp, copies: Copies, landed: Lanes) -> Copies | None:
    """Let those copies arrive whose group is below their lane's number; what is still in flight comes back."""
    done = copies.group < landed[copies.lanes]
    if done.any():
        slot = warp.slot[copies.lanes[done]]
        warp.blocks.shared.land_copy(copies.at[done], copies.values[done], warp.index, slot)
    if done.all():
        return None
    return Copies(copies.lanes[~done], copies.group[~done], copies.at[~done], copies.values[~done])


def _copy(kernel: Kernel, instruction: Instruction) -> Step:
    """`cp.async`: the bytes are read now and land when the thread waits, as late as the hardware may."""
    if "commit_group" in instruction.op:

        def commit(warp: Warp, mask: Mask) -> None:
            warp.together(mask, "cp.async.commit_group")
            warp.committed[warp.lanes_of(mask)] += 1

        return commit
    if "wait_group" in instruction.op:
        pending = int(instruction.operands[0])

        def wait(warp: Warp, mask: Mask) -> None:
            landed = warp.committed - pending
            if mask is not None:
                landed = np.where(mask, landed, 0)
            warp.copies = [rest for copies in warp.copies if (rest := _land(warp, copies, landed)) is not None]

        return wait
    if len(instruction.operands) != 3:
        raise PtxError(f"not modelled: `{instruction.text}`")
    to, source = pointer_of(kernel, instruction.operands[0]), pointer_of(kernel, instruction.operands[1])
    size = int(instruction.operands[2])

    def issue(warp: Warp, mask: Mask) -> None:
        lanes, blocks = warp.lanes_of(mask), warp.blocks
        target: Lanes = to(warp)[lanes]
        blocks.shared.issue_copy(target, size, warp.index, warp.slot[lanes])
        values = blocks.memory.read(source(warp)[lanes], size, threads_of(warp, lanes), blocks.report)
        warp.copies.append(Copies(lanes, warp.committed[lanes], target, values))

    return issue


def memory(kernel: Kernel, instruction: Instruction) -> Step | None:
    """The step of a memory instruction, or None when it is something else."""
    op = instruction.op
    if op[:2] == ("ld", "param"):
        return _load_parameter(kernel, instruction)
    if op[0] == "ld":
        return _load(kernel, instruction)
    if op[0] == "st":
        return _store(kernel, instruction)
    if op[:2] == ("cp", "async"):
        return _copy(kernel, instruction)
    return None
