"""What warps know of each other, as vector clocks.

A warp counts the barriers that it has passed. Where warps meet, each learns what the others know: up to which of its
counts the accesses of every warp of the cluster came before. Two accesses are a race where the warp of the second one
does not know of the first. A box of messages (ptx_boxes.py) has a place among the warps: 1 once it is known that all of
it has come. Not modelled: what this says of global memory. Another block's writes there need counters and fences, as
without clusters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_memory import Ints, Report

MOST_IN_CLUSTER = 8  # what every chip with clusters can run
MOST_BOXES = 32  # of a block
_LEFT = 1 << 30  # rounds of the cluster's barrier for which a warp that has left the kernel counts as arrived

Warps = NDArray[np.bool_]  # [blocks, warps]


class Clocks:
    """The clocks of `warps` warps each of several blocks, of which `cluster` neighbours each are a cluster."""

    def __init__(self, blocks: int, warps: int, cluster: int, report: Report) -> None:
        self.cluster, self.warps, self._report = cluster, warps, report
        self._places = warps + MOST_BOXES
        # [block, warp, block of the cluster, warp or box]
        self._known = np.zeros((blocks, warps, cluster, self._places), np.int64)
        for warp in range(warps):
            self._tick(np.arange(blocks), warp)
        # Rounds of the cluster's barrier: arrivals and waits of each warp, and what arrivals of even and odd ones knew.
        self.arrivals, self.waits = np.zeros((blocks, warps), np.int64), np.zeros((blocks, warps), np.int64)
        self._told = np.zeros((blocks // cluster, 2, cluster, self._places), np.int64)

    def now(self, slot: Ints, warp: int) -> Ints:
        """The clock of a warp of these blocks."""
        return np.asarray(self._known[slot, warp, slot % self.cluster, warp])

    def known(self, slot: Ints, warp: int, of: Ints, place: Ints) -> Ints:
        """What a warp of these blocks knows of ``[lanes, bytes]`` places in the blocks `of`."""
        start = ((slot * self.warps + warp) * self.cluster + of % self.cluster) * self._places
        return np.asarray(self._known.reshape(-1)[start[:, None] + place])

    def known_of_warps(self, slot: Ints, warp: int, of: Ints) -> Ints:
        """What a warp of these blocks knows of all warps of the blocks `of`: ``[warps, lanes, 1]``."""
        return np.asarray(self._known[slot, warp, of % self.cluster, : self.warps].T[:, :, None])

    def learn_of_box(self, slot: int, warp: int, number: int) -> None:
        """A warp has seen that all of this box of its block has come."""
        self._known[slot, warp, slot % self.cluster, self.warps + number] = 1

    def meet(self, together: Warps) -> None:
        """These warps of every block pass a barrier of theirs."""
        for block in np.flatnonzero(together.any(axis=1)):
            warps = together[block]
            self._known[block, warps] = self._known[block, warps].max(axis=0)
        for warp in range(self.warps):
            self._tick(np.flatnonzero(together[:, warp]), warp)

    def arrive(self, slot: Ints, warp: int) -> None:
        """A warp of these blocks arrives at the barrier of its cluster, and goes on."""
        if (self.arrivals[slot, warp] > self.waits[slot, warp]).any():
            self._report("cluster barrier: two arrivals without a wait between them")
        self.arrivals[slot, warp] = self.waits[slot, warp] + 1
        for block in slot:  # what was told two rounds ago is known to all by now
            told = self._told[block // self.cluster, self.arrivals[block, warp] % 2]
            np.maximum(told, self._known[block, warp], out=told)
        self._tick(slot, warp)

    def start_wait(self, slot: Ints, warp: int) -> None:
        """A warp of these blocks waits for the round of its last arrival."""
        if (self.arrivals[slot, warp] <= self.waits[slot, warp]).any():
            self._report("cluster barrier: a wait without an arrival")
            self.arrivals[slot, warp] = self.waits[slot, warp] + 1  # so that all can end

    def completed(self, waiting: Warps, left: Warps) -> Warps:
        """Those of the waiting warps whose round is complete: every warp of their cluster has arrived or left."""
        arrivals = np.where(left, _LEFT, self.arrivals).min(axis=1)
        rounds = np.repeat(arrivals.reshape(-1, self.cluster).min(axis=1), self.cluster)
        return np.asarray(waiting & (self.waits < rounds[:, None]))

    def finish_wait(self, ready: Warps) -> None:
        """These warps go on after their wait."""
        self.waits += ready
        for block, warp in np.argwhere(ready):
            known = self._known[block, warp]
            np.maximum(known, self._told[block // self.cluster, self.waits[block, warp] % 2], out=known)

    def check_end(self) -> None:
        """Report warps that have ended too early."""
        if (self.arrivals > self.waits).any():
            self._report("cluster barrier: a warp ends without the wait that its arrival asks for")

    def _tick(self, slot: Ints, warp: int) -> None:
        self._known[slot, warp, slot % self.cluster, warp] += 1
