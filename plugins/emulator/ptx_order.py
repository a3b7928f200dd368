"""Instructions that order the blocks of a launch and the launches of a plan: counters, fences, waits and prefetches."""

from __future__ import annotations

import numpy as np

from emulator.ptx_memory_ops import pointer_of, threads_of
from emulator.ptx_ops import Step
from emulator.ptx_text import Instruction, Kernel, PtxError
from emulator.ptx_warp import Mask, Warp, reader, writer


def _atomic(kernel: Kernel, instruction: Instruction) -> Step:
    """`atom.inc`: blocks in step come one after the other, in a random order."""
    if instruction.op != ("atom", "global", "inc", "u32"):
        raise PtxError(f"not modelled: `{instruction.text}`")
    store = writer(kernel, instruction.operands[0])
    pointer, last = pointer_of(kernel, instruction.operands[1]), reader(kernel, instruction.operands[2], np.uint32)

    def step(warp: Warp, mask: Mask) -> None:
        warp.look()
        before = np.zeros(warp.lanes.size, np.uint32)
        at, most, blocks, lanes = pointer(warp), last(warp), warp.blocks, warp.lanes_of(mask)
        for lane in blocks.order.sample(lanes.tolist(), lanes.size):
            who = threads_of(warp, np.array([lane]))
            before[lane] = blocks.memory.count_up(at[[lane]], int(most[lane]), who, blocks.report)
        store(warp, before, mask)

    return step


def _fence(kernel: Kernel, instruction: Instruction) -> Step:
    if instruction.op != ("fence", "acq_rel", "gpu"):
        raise PtxError(f"not modelled: `{instruction.text}`")

    def step(warp: Warp, mask: Mask) -> None:
        for block in np.unique(warp.blocks.number[warp.lanes_of(mask)]).tolist():
            warp.blocks.memory.known.fence(block, warp.blocks.shared.epoch)

    return step


def _launches(kernel: Kernel, instruction: Instruction) -> Step:
    if instruction.op[1] == "wait":

        def wait(warp: Warp, mask: Mask) -> None:
            warp.waited[warp.lanes_of(mask)] = True

        return wait
    if instruction.op[1] != "launch_dependents":
        raise PtxError(f"not modelled: `{instruction.text}`")

    return lambda warp, mask: None  # when the next launch begins changes nothing here: it waits itself


def _prefetch(kernel: Kernel, instruction: Instruction) -> Step:
    if instruction.op[:2] != ("prefetch", "global"):
        raise PtxError(f"not modelled: `{instruction.text}`")
    pointer = pointer_of(kernel, instruction.operands[0])

    def step(warp: Warp, mask: Mask) -> None:
        warp.blocks.memory.prefetch(pointer(warp)[warp.lanes_of(mask)], warp.blocks.report)

    return step


_ORDER = {"atom": _atomic, "fence": _fence, "griddepcontrol": _launches, "prefetch": _prefetch}


def ordering(kernel: Kernel, instruction: Instruction) -> Step | None:
    """The step of an instruction that orders blocks or launches, or None when it is something else."""
    make = _ORDER.get(instruction.op[0])
    return make(kernel, instruction) if make else None
