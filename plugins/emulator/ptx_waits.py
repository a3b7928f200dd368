"""Instructions at which a warp of the PTX emulator waits for others: barriers and boxes.

Given the lanes that stand at the instruction and those of them whose guard holds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_cluster_ops import cluster, cluster_memory, try_box
from emulator.ptx_text import Instruction, Kernel, PtxError
from emulator.ptx_warp import BLOCK, BOX, CLUSTER, Mask, Warp, reader


def barrier(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    """`bar`: of a warp, a block or a group."""
    warp.together(active, "barrier")
    if instruction.op[1] == "warp":  # lanes run in step anyway
        warp.goto(pc + 1, mask)
        return
    if active is not mask:
        warp.goto(pc + 1, mask)
    if instruction.operands == ("0",):
        warp.wait(pc + 1, active)
    else:
        warp.wait(pc + 1, active, _group(warp, kernel, instruction, active))


def _group(warp: Warp, kernel: Kernel, instruction: Instruction, active: Mask) -> NDArray[np.int8]:
    """What lanes wait for at a named barrier."""
    if instruction.op != ("bar", "sync") or len(instruction.operands) != 2:
        raise PtxError(f"not modelled: `{instruction.text}`")
    lanes = warp.lanes_of(active)
    group, threads = (reader(kernel, each, np.uint32)(warp)[lanes].astype(np.int64) for each in instruction.operands)
    if ((group < 1) | (group > 15)).any():
        warp.blocks.report("named barrier: a number that is not 1 to 15")
        group = np.clip(group, 1, 15)
    of_warps = np.unique(np.stack([warp.slot[lanes], group, threads]), axis=1)
    if np.unique(of_warps[0]).size != of_warps.shape[1]:
        warp.blocks.report("named barrier: lanes of a warp name two")
    warp.blocks.barriers.come(of_warps[0], warp.index, of_warps[1], of_warps[2])
    return (group + BLOCK).astype(np.int8)


def cluster_barrier(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    """`barrier.cluster`: an arrival, or the wait for its round."""
    warp.together(active, "cluster barrier")
    shared, slot = cluster_memory(warp), np.unique(warp.slot[warp.lanes_of(active)])
    if instruction.op == ("barrier", "cluster", "arrive", "release", "aligned"):
        shared.clocks.arrive(slot, warp.index)
        warp.goto(pc + 1, mask)
        return
    if instruction.op != ("barrier", "cluster", "wait", "acquire", "aligned"):
        raise PtxError(f"not modelled: `{instruction.text}`")
    shared.clocks.start_wait(slot, warp.index)
    if active is not mask:
        warp.goto(pc + 1, mask)
    warp.wait(pc + 1, active, CLUSTER)


def box(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    """Lanes that see a box which is not full stop until another one of their block is."""
    if instruction.op[1] != "try_wait":
        step = cluster(kernel, instruction)
        if step is not None:
            step(warp, active)
        warp.goto(pc + 1, mask)
        return
    if instruction.op[2:] != ("parity", "shared", "b64") or instruction.operands[2] != "0":
        raise PtxError(f"not modelled: `{instruction.text}`")
    missing = try_box(kernel, instruction, warp, active)
    warp.goto(pc + 1, mask)
    if missing.any():
        warp.wait(pc + 1, missing, BOX)
