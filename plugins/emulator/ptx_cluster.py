"""Clusters of the PTX emulator: shared memory that the blocks of a cluster write for each other, and their barrier.

A round of the barrier is complete once every warp of every block of the cluster has arrived or left. Between its own
arrival and its wait a warp goes on, so that a round orders two accesses only if it lies between them for both: the
warp of the first arrived after it, and the warp of the second waited before it. Every byte therefore remembers how
often its last reader and writer had arrived. Not modelled: what a round says of global memory. Another block's writes
there need counters and fences, as without clusters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_memory import EPOCH_AT, Bytes, Ints, Report, SharedMemory

MOST_IN_CLUSTER = 8  # what every chip with clusters can run
_ROUND_AT, _ROUNDS, _WARP = 8, 0xFFFF, 0xFF
_BY_PEER = 1  # the writer of a byte that another block wrote: somebody, in no epoch
_NEVER = -1


class ClusterMemory(SharedMemory):
    """The shared memory of several blocks, of which `cluster` neighbours each can reach one another's."""

    def __init__(self, size: int, blocks: int, warps: int, cluster: int, report: Report) -> None:
        super().__init__(size, blocks, report)
        self.cluster = cluster
        # [block, warp]: arrivals at the cluster barrier, waits there, and the arrivals at its last peer store
        self.arrivals, self.waits = np.zeros((blocks, warps), np.int64), np.zeros((blocks, warps), np.int64)
        self._stored = np.full((blocks, warps), _NEVER)
        self._received = np.full(blocks, _NEVER)  # arrivals of the last warp that stored into a block
        self._peer = np.zeros(size * blocks, np.int64)  # 1 + block, arrivals and warp of a peer that stored

    def arrive(self, slot: Ints, warp: int) -> None:
        """A warp of these blocks arrives."""
        if (self.arrivals[slot, warp] > self.waits[slot, warp]).any():
            self._report("cluster barrier: two arrivals without a wait between them")
        self.arrivals[slot, warp] = self.waits[slot, warp] + 1

    def start_wait(self, slot: Ints, warp: int) -> None:
        """A warp of these blocks waits for the round of its last arrival."""
        if (self.arrivals[slot, warp] <= self.waits[slot, warp]).any():
            self._report("cluster barrier: a wait without an arrival")
            self.arrivals[slot, warp] = self.waits[slot, warp] + 1  # so that all can end

    def completed(self, left: NDArray[np.bool_]) -> Ints:
        """Rounds that are complete for each block, given the warps ``[blocks, warps]`` that have left the kernel."""
        arrivals = np.where(left, _ROUNDS, self.arrivals).min(axis=1)
        return np.asarray(np.repeat(arrivals.reshape(-1, self.cluster).min(axis=1), self.cluster))

    def store_peer(self, at: Ints, values: Bytes, rank: Ints, warp: int, slot: Ints) -> None:
        """Store one row of bytes per offset in the shared memory of these ranks of the own cluster."""
        target = slot - slot % self.cluster + rank
        own = target == slot
        if own.any():
            self.write(at[own], values[own], warp, slot[own])
        if (self.waits[slot[~own], warp] == 0).any():
            self._report("peer store: before a cluster barrier, so that the other block may not have begun")
        for block in np.unique(slot[~own]):  # one by one, so that blocks in step notice each other
            lanes = ~own & (slot == block)
            index = self._index(at[lanes], values.shape[1], target[lanes], "peer store")
            self._check_store(index, warp, slot[lanes])
            self._peer[index] = self._arrived(1 + block, warp, slot[lanes])
            self._writer[index], self.data[index] = _BY_PEER, values[lanes]
            arrivals = self._stored[block, warp] = self.arrivals[block, warp]
            self._received[target[lanes]] = np.maximum(self._received[target[lanes]], arrivals)

    def check_end(self) -> None:
        """Report what blocks that have ended left undone."""
        if (self.arrivals > self.waits).any():
            self._report("cluster barrier: a warp ends without the wait that its arrival asks for")
        alone = (self._stored >= self.arrivals) & (self._stored != _NEVER)
        if alone.any() or (self._received >= self.waits.max(axis=1)).any():
            self._report("peer store: no cluster barrier follows, so that the other block may have ended")

    def _check_store(self, index: Ints, warp: int, slot: Ints) -> None:
        self._check_owner(index)
        before = [self._writer[index], self._reader[index]]
        if any(((last > 0) & self._open(last, warp, slot)).any() for last in before):
            self._report("peer store: over bytes that their own block uses in the same round")
        peer = self._peer[index]
        other = (peer > 0) & ((peer >> EPOCH_AT != slot[:, None] + 1) | (peer & _WARP != warp))
        if (other & self._open(peer, warp, slot)).any():
            self._report("peer store: over bytes that another warp stores in the same round")

    def _open(self, last: Ints, warp: int, slot: Ints) -> NDArray[np.bool_]:
        """Accesses with no complete round between them and the warp."""
        return np.asarray((last >> _ROUND_AT & _ROUNDS) >= self.waits[slot, warp][:, None])

    def _arrived(self, number: Any, warp: int, slot: Ints) -> Ints:  # noqa: ANN401 - an integer of either kind
        return np.asarray((number << EPOCH_AT | self.arrivals[slot, warp] << _ROUND_AT | warp)[:, None])

    # What the rules of one block say otherwise.
    def _stamp(self, warp: int, slot: Ints) -> Ints:
        return self._arrived(self.epoch, warp, slot)

    def _by_other(self, last: Ints, warp: int, slot: Ints) -> NDArray[np.bool_]:
        same = (last >> EPOCH_AT == self.epoch) & (last & _WARP != warp)
        return np.asarray(same & self._open(last, warp, slot))

    def _check_peers(self, index: Ints, warp: int, slot: Ints) -> None:
        peer = self._peer[index]
        if ((peer > 0) & self._open(peer, warp, slot)).any():
            self._report("shared memory: access to bytes that another block stores, with no cluster barrier between")

    def write(self, at: Ints, values: Bytes, warp: int, slot: Ints) -> None:
        """Store one row of bytes per offset."""
        super().write(at, values, warp, slot)
        self._peer[self._index(at, values.shape[1], slot, "write")] = 0
