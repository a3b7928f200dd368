"""Instructions of clusters in the PTX emulator: addresses and stores in another block's shared memory."""

from __future__ import annotations

import numpy as np

from emulator.ptx_cluster import ClusterMemory
from emulator.ptx_memory_ops import pointer_of, raw_values
from emulator.ptx_ops import Step
from emulator.ptx_text import Instruction, Kernel, PtxError
from emulator.ptx_warp import Mask, Warp, reader, writer

_RANK_AT = 24  # bits of an address that `mapa` makes: 1 + rank, then the address in that block; 0 is the own block


def cluster_memory(warp: Warp) -> ClusterMemory:
    """The shared memory of a kernel that has such instructions."""
    if not isinstance(warp.blocks.shared, ClusterMemory):
        raise PtxError("the kernel has no instruction of clusters")
    return warp.blocks.shared


def _map(kernel: Kernel, instruction: Instruction) -> Step:
    if instruction.op != ("mapa", "shared", "cluster", "u32"):
        raise PtxError(f"not modelled: `{instruction.text}`")
    store = writer(kernel, instruction.operands[0])
    own, rank = (reader(kernel, operand, np.uint32) for operand in instruction.operands[1:])

    def step(warp: Warp, mask: Mask) -> None:
        of = rank(warp)
        if (of[warp.lanes_of(mask)] >= cluster_memory(warp).cluster).any():
            warp.blocks.report("mapa: the cluster has no such block")
            of = of % np.uint32(cluster_memory(warp).cluster)
        store(warp, own(warp) + ((of + np.uint32(1)) << np.uint32(_RANK_AT)), mask)

    return step


def _store(kernel: Kernel, instruction: Instruction) -> Step:
    pointer, values = pointer_of(kernel, instruction.operands[0]), raw_values(kernel, instruction)

    def step(warp: Warp, mask: Mask) -> None:
        lanes = warp.lanes_of(mask)
        shared, at, slot = cluster_memory(warp), pointer(warp)[lanes], warp.slot[lanes]
        mapped = at >> _RANK_AT
        rank = np.where(mapped > 0, mapped - 1, slot % shared.cluster) % shared.cluster
        shared.store_peer(at & ((1 << _RANK_AT) - 1), values(warp)[lanes], rank, warp.index, slot)

    return step


def cluster(kernel: Kernel, instruction: Instruction) -> Step | None:
    """The step of an instruction of clusters, or None when it is something else."""
    if instruction.op[:3] == ("st", "shared", "cluster"):
        return _store(kernel, instruction)
    return _map(kernel, instruction) if instruction.op[0] == "mapa" else None
