"""Barriers of the PTX emulator: of a block, of a group of its warps with a number, and of a cluster."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_clocks import Clocks, Warps
from emulator.ptx_memory import Ints, Report
from emulator.ptx_warp import BLOCK, BOX, CLUSTER, LANES, NOTHING

_GROUPS = 16  # with the block, which is number 0
_WHY = {
    CLUSTER: "warps wait at the cluster barrier for others that do not arrive",
    BOX: "warps wait for a box that never fills",
    BLOCK: "warps wait at the barrier of their block for others that do not come",
}


class Barriers:
    """Who may go on, given what each warp of several blocks waits for: ``[blocks, warps]``, as Warp.waiting has it."""

    def __init__(self, blocks: int, warps: int, clocks: Clocks | None, report: Report) -> None:
        self._clocks, self._report, self._warps = clocks, report, warps
        self._group = np.zeros((blocks, warps), np.int64)  # that a warp belongs to, or 0
        self._threads = np.zeros((blocks, _GROUPS), np.int64)  # of each group, once one of its warps has come

    def come(self, slot: Ints, warp: int, group: Ints, threads: Ints) -> None:
        """A warp of these blocks comes to the barriers of these groups."""
        before, size = self._group[slot, warp], self._threads[slot, group]
        if ((before != 0) & (before != group)).any():
            self._report("named barrier: a warp belongs to two groups")
        if ((size != 0) & (size != threads)).any():
            self._report("named barrier: two numbers of threads for one group")
        if (threads % LANES != 0).any() or (threads > self._warps * LANES).any():
            self._report("named barrier: a number of threads that no warps of the block have")
        self._group[slot, warp], self._threads[slot, group] = group, threads
        if ((self._group[slot] == group[:, None]).sum(axis=1) * LANES > threads).any():
            self._report("named barrier: more warps than its number of threads says")

    def complete(self, waits: NDArray[np.int8]) -> Iterator[tuple[int, Warps]]:
        """What is complete, and the warps that may go on. No warp is running: who does not wait has left."""
        at_block = waits == BLOCK
        ready = at_block.any(axis=1) & (at_block | (waits == NOTHING)).all(axis=1)
        if ready.any():
            yield BLOCK, at_block & ready[:, None]
        if self._clocks is None:
            return
        ready = self._clocks.completed(waits == CLUSTER, waits == NOTHING)
        if ready.any():
            yield CLUSTER, ready
        for group in np.unique(waits[waits > BLOCK]) - BLOCK:
            here = waits == BLOCK + group
            ready = here & (here.sum(axis=1) * LANES >= self._threads[:, group])[:, None]
            if ready.any():
                yield BLOCK + int(group), ready

    def go_on(self, code: int, ready: Warps) -> None:
        """These warps pass."""
        if code == BLOCK and not ready[ready.any(axis=1)].all():
            self._report("barrier: some warps have already left the kernel")
        if self._clocks is None:
            return
        if code == CLUSTER:
            self._clocks.finish_wait(ready)
        else:
            self._clocks.meet(ready)


def deadlock(waits: NDArray[np.int8]) -> str:
    """Why nobody can go on."""
    found = np.unique(waits[waits != NOTHING]).tolist()
    why = [_WHY.get(code, f"warps wait at named barrier {code - BLOCK} for others that do not come") for code in found]
    return f"deadlock: {'; '.join(why)}"
