"""Instructions of clusters in the PTX emulator: addresses in other blocks, boxes and messages."""

from __future__ import annotations

import numpy as np

from emulator.ptx_cluster import ClusterMemory
from emulator.ptx_memory import Ints
from emulator.ptx_memory_ops import pointer_of, raw_values
from emulator.ptx_ops import Step
from emulator.ptx_text import Instruction, Kernel, PtxError
from emulator.ptx_warp import Lanes, Mask, Warp, reader, writer

_RANK_AT = 24  # bits of an address that `mapa` makes: 1 + rank, then the address in that block; 0 is the own block
_SEND = ("st", "async", "shared", "cluster", "mbarrier", "complete_tx", "bytes")


def cluster_memory(warp: Warp) -> ClusterMemory:
    """The shared memory of a kernel that has such instructions."""
    if warp.blocks.cluster is None:
        raise PtxError("the kernel has no instruction of clusters")
    return warp.blocks.cluster


def _map(kernel: Kernel, instruction: Instruction) -> Step:
    store = writer(kernel, instruction.operands[0])
    own, rank = (reader(kernel, operand, np.uint32) for operand in instruction.operands[1:])

    def step(warp: Warp, mask: Mask) -> None:
        of, blocks = rank(warp), cluster_memory(warp).clocks.cluster
        if (of[warp.lanes_of(mask)] >= blocks).any():
            warp.blocks.report("mapa: the cluster has no such block")
            of = of % np.uint32(blocks)
        store(warp, own(warp) + ((of + np.uint32(1)) << np.uint32(_RANK_AT)), mask)

    return step


def _place(at: Ints, slot: Ints, cluster: int) -> tuple[Ints, Ints]:
    """The block and the address there that an address in the window of a cluster means."""
    mapped = at >> _RANK_AT
    return np.where(mapped > 0, slot - slot % cluster + mapped - 1, slot), at & ((1 << _RANK_AT) - 1)


def _send(kernel: Kernel, instruction: Instruction) -> Step:
    values = raw_values(kernel, instruction)
    to, box = (pointer_of(kernel, instruction.operands[i]) for i in (0, 2))

    def step(warp: Warp, mask: Mask) -> None:
        lanes = warp.lanes_of(mask)
        shared, slot = cluster_memory(warp), warp.slot[lanes]
        target, at = _place(to(warp)[lanes], slot, shared.clocks.cluster)
        of_box, box_at = _place(box(warp)[lanes], slot, shared.clocks.cluster)
        if (target != of_box).any():
            warp.blocks.report("message: to another block than its box")
        shared.send(at, values(warp)[lanes], box_at, target, warp.index, slot)

    return step


def _make(kernel: Kernel, instruction: Instruction) -> Step:
    pointer = pointer_of(kernel, instruction.operands[0])

    def step(warp: Warp, mask: Mask) -> None:
        lanes = warp.lanes_of(mask)
        cluster_memory(warp).make_box(pointer(warp)[lanes], warp.slot[lanes], warp.index, warp.thread[lanes])

    return step


def _expect(kernel: Kernel, instruction: Instruction) -> Step:
    pointer, count = pointer_of(kernel, instruction.operands[1]), reader(kernel, instruction.operands[2], np.uint32)

    def step(warp: Warp, mask: Mask) -> None:
        lanes = warp.lanes_of(mask)
        cluster_memory(warp).expect(pointer(warp)[lanes], count(warp)[lanes], warp.slot[lanes], warp.index)

    return step


def _fence(kernel: Kernel, instruction: Instruction) -> Step:
    def step(warp: Warp, mask: Mask) -> None:
        lanes = warp.lanes_of(mask)
        cluster_memory(warp).fence_boxes(warp.slot[lanes], warp.thread[lanes])

    return step


def try_box(kernel: Kernel, instruction: Instruction, warp: Warp, active: Mask) -> Lanes:
    """`mbarrier.try_wait`: which lanes see a box that is not full."""
    lanes, full = warp.lanes_of(active), np.ones(warp.lanes.size, bool)
    at = pointer_of(kernel, instruction.operands[1])(warp)[lanes]
    full[lanes] = cluster_memory(warp).is_full(at, warp.slot[lanes], warp.index)
    writer(kernel, instruction.operands[0])(warp, full, active)
    return ~full


def cluster(kernel: Kernel, instruction: Instruction) -> Step | None:
    """The step of an instruction of clusters, or None when it is something else."""
    op, operands = instruction.op, instruction.operands
    if op == ("mapa", "shared", "cluster", "u32"):
        return _map(kernel, instruction)
    if op in ((*_SEND, "f32"), (*_SEND, "v4", "f32")):
        return _send(kernel, instruction)
    if op == ("mbarrier", "init", "shared", "b64") and operands[1] == "1":
        return _make(kernel, instruction)
    if op == ("mbarrier", "arrive", "expect_tx", "shared", "b64") and operands[0] == "_":
        return _expect(kernel, instruction)
    if op == ("fence", "mbarrier_init", "release", "cluster"):
        return _fence(kernel, instruction)
    if op[0] in {"mapa", "mbarrier"} or (op[0] == "st" and "cluster" in op):
        raise PtxError(f"not modelled: `{instruction.text}`")
    return None
