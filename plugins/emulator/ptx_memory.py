"""Memory of the PTX emulator, with the same rules as shadow.cpp but whole warps at a time.

Races are checked between warps, not inside one: the source emulator, which schedules single threads, does that. What
another block of the launch wrote may be read by a fresh read alone, after a counter showed that the other block had
fenced it off. On chips that overlap launches a thread must wait for the launch in front before it touches what that one
may use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Report = Callable[[str], None]

_GAP = 1 << 20  # between buffers, so that a stray address falls into no other one
_NOBODY, _SEVERAL = -1, -2
_SEVERAL_WARPS = 255  # a block has at most 32
EPOCH_AT, WARP = 8, 0xFF  # bits of what a byte of shared memory remembers: epoch, warp


@dataclass
class Buffer:
    """Registered global memory."""

    name: str
    base: int
    data: Bytes
    writable: bool
    written: NDArray[np.bool_]
    writer: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # block and thread
    reader: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # block
    epoch: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # of the writer's block, when it wrote


@dataclass(frozen=True)
class Threads:
    """Who accesses memory: an entry a lane."""

    block: Ints
    thread: Ints
    waited: NDArray[np.bool_]  # for the launch in front
    epoch: int  # barriers that their blocks have passed


class Known:
    """What the blocks of a launch know of each other: until which epoch another one has fenced off what it wrote."""

    def __init__(self) -> None:
        self._fenced: dict[int, int] = {}
        self._counted: defaultdict[int, dict[int, int]] = defaultdict(
            dict
        )  # what each counter's arrivals had fenced off
        self._seen: defaultdict[int, dict[int, int]] = defaultdict(dict)  # by a block at its counters
        self._acquired: defaultdict[int, dict[int, int]] = defaultdict(dict)  # and after its next fence

    def count(self, counter: int, block: int) -> None:
        """A block arrives at a counter."""
        self._seen[block] |= self._counted[counter]
        if block in self._fenced:
            self._counted[counter][block] = self._fenced[block]

    def fence(self, block: int, epoch: int) -> None:
        """What the block wrote before its last barrier is fenced off, and what its counters showed can be read."""
        self._fenced[block] = epoch
        self._acquired[block] |= self._seen[block]

    def may_read(self, block: Ints, writer: Ints, epoch: Ints) -> bool:
        """Whether blocks may read what others wrote in these epochs."""
        found = np.unique(np.stack([block, writer, epoch]), axis=1).T.tolist()
        return all(epoch < self._acquired[block].get(writer, 0) for block, writer, epoch in found)


class GlobalMemory:
    """Buffers at made-up addresses."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._next = 1 << 32
        self.known = Known()

    def add(self, array: NDArray[Any], name: str, *, writable: bool, zeroed: bool = False) -> int:
        """Register memory and return its made-up address; `zeroed` memory may be read before it is written."""
        data = array.view(np.uint8).reshape(-1)
        self._buffers.append(Buffer(name, self._next, data, writable, np.full(data.size, zeroed)))
        self._next += (data.size + 2 * _GAP) // 256 * 256
        return self._buffers[-1].base

    def clear(self) -> None:
        """Forget all buffers."""
        self._buffers.clear()

    def start_launch(self) -> None:
        """Forget who wrote and read what in the launch before."""
        self.known = Known()
        for buffer in self._buffers:
            size = buffer.data.size if buffer.writable else 0
            buffer.writer, buffer.reader = np.full(size, _NOBODY, np.int64), np.full(size, _NOBODY, np.int64)
            buffer.epoch = np.zeros(size, np.int64)

    def _locate(self, at: Ints, size: int, what: str, report: Report) -> list[tuple[Buffer, NDArray[np.bool_], Ints]]:
        """Which lanes fall into which buffer, and the byte indices there."""
        if (at % size).any():
            report(f"global memory: misaligned {what} of {size} bytes")
        found = []
        which = np.searchsorted([buffer.base for buffer in self._buffers], at, "right") - 1
        for number in np.unique(which):
            buffer, lanes = self._buffers[number], which == number
            start = at[lanes] - buffer.base
            inside = (start >= 0) & (start + size <= buffer.data.size)
            if not inside.all():
                report(f"global memory: {what} out of bounds{self._neighbour(int(at[lanes][~inside][0]))}")
                lanes[lanes], start = inside, start[inside]
            if start.size:
                found.append((buffer, lanes, start[:, None] + np.arange(size)))
        return found

    def _neighbour(self, at: int) -> str:
        for buffer in self._buffers:
            if buffer.base - _GAP // 2 <= at < buffer.base + buffer.data.size + _GAP // 2:
                return f" of {buffer.name}"
        return ""

    def _check_waited(self, buffer: Buffer, waited: NDArray[np.bool_], report: Report) -> None:
        if (buffer.writable or buffer.name == "x") and not waited.all():
            report(f"global memory: access to {buffer.name} before the launch in front has ended")

    def read(self, at: Ints, size: int, who: Threads, report: Report, *, fresh: bool = False) -> Bytes:
        """Bytes ``[lanes, size]`` at these addresses; zeros where nothing is."""
        out = np.zeros((at.size, size), np.uint8)
        for buffer, lanes, index in self._locate(at, size, "read", report):
            out[lanes] = buffer.data[index]
            self._check_waited(buffer, who.waited[lanes], report)
            if buffer.writable:
                if not buffer.written[index].all():
                    report(f"global memory: read of bytes of {buffer.name} that nobody wrote")
                block = np.broadcast_to(who.block[lanes][:, None], index.shape)
                writer, reader = buffer.writer[index], buffer.reader[index]
                other = (writer >= 0) & (writer >> 12 != block)
                if other.any() and not (
                    fresh and self.known.may_read(block[other], writer[other] >> 12, buffer.epoch[index][other])
                ):
                    report(f"global memory: read of {buffer.name} that another block writes in the same launch")
                buffer.reader[index] = np.where((reader == _NOBODY) | (reader == block), block, _SEVERAL)
        return out

    def write(self, at: Ints, values: Bytes, who: Threads, report: Report) -> None:
        """Store one row of bytes per address."""
        for buffer, lanes, index in self._locate(at, values.shape[1], "write", report):
            if not buffer.writable:
                report(f"global memory: write to the input {buffer.name}")
                continue
            self._check_waited(buffer, who.waited[lanes], report)
            writer = np.broadcast_to(((who.block[lanes] << 12) | who.thread[lanes])[:, None], index.shape)
            before, reader = buffer.writer[index], buffer.reader[index]
            if ((reader != _NOBODY) & (reader != writer >> 12)).any():
                report(f"global memory: write to {buffer.name} that another block reads in the same launch")
            repeated = np.unique(index).size != index.size
            if ((before >= 0) & (before != writer)).any() or repeated:
                report(f"global memory: two threads write the same byte of {buffer.name}")
            buffer.writer[index], buffer.written[index], buffer.epoch[index] = writer, True, who.epoch
            buffer.data[index] = values[lanes]

    def count_up(self, at: Ints, last: int, who: Threads, report: Report) -> int:
        """Add one to the counter of one lane, or make zero of `last` and more; returns what was there before."""
        for buffer, _, index in self._locate(at, 4, "write", report):
            if not buffer.writable:
                report(f"global memory: write to the input {buffer.name}")
                return 0
            self._check_waited(buffer, who.waited, report)
            if not buffer.written[index].all():
                report(f"global memory: read of bytes of {buffer.name} that nobody wrote")
            self.known.count(int(at[0]), int(who.block[0]))
            counter = buffer.data[index[0, 0] : index[0, 0] + 4].view(np.uint32)
            before = int(counter[0])
            counter[0] = 0 if before >= last else before + 1
            return before
        return 0

    def prefetch(self, at: Ints, report: Report) -> None:
        """These addresses must be in bounds."""
        self._locate(at, 1, "prefetch", report)


class SharedMemory:
    """The shared memory of several blocks and what each byte remembers. `slot` says which block a lane belongs to."""

    def __init__(self, size: int, blocks: int, report: Report) -> None:
        self.data = np.full(size * blocks, 0xA5, np.uint8)
        self.epoch = 1
        self._size, self._report = size, report
        self._copied = np.zeros(size * blocks, bool)  # an asynchronous copy owns the byte
        # The warp that last wrote or read a byte, and the epoch.
        self._writer, self._reader = np.zeros(size * blocks, np.int64), np.zeros(size * blocks, np.int64)

    def _index(self, at: Ints, size: int, slot: Ints, what: str) -> Ints:
        if (at % size).any():
            self._report(f"shared memory: misaligned {what} of {size} bytes")
        bad = (at < 0) | (at + size > self._size)
        if bad.any():
            self._report(f"shared memory: {what} out of bounds")
            at = np.where(bad, 0, at)
        return np.asarray((at + slot * self._size)[:, None] + np.arange(size))

    def _check_owner(self, index: Ints) -> None:
        if self._copied[index].any():
            self._report("shared memory: access to bytes that an asynchronous copy still owns")

    def _check_messages(self, index: Ints, warp: int, slot: Ints) -> None:
        """Without clusters no other block reaches these bytes."""

    def _stamp(self, warp: int, slot: Ints) -> int | Ints:
        return self.epoch << EPOCH_AT | warp

    def _by_other(self, last: Ints, warp: int, slot: Ints) -> NDArray[np.bool_]:
        return np.asarray((last >> EPOCH_AT == self.epoch) & (last != self._stamp(warp, slot)))

    def _read_by_other(self, index: Ints, warp: int, slot: Ints) -> bool:
        return bool(self._by_other(self._reader[index], warp, slot).any())

    def _note_read(self, index: Ints, warp: int, slot: Ints) -> None:
        reader, stamp = self._reader[index], self._stamp(warp, slot)
        several = self._by_other(reader, warp, slot)
        self._reader[index] = np.where(several, np.maximum(reader, stamp) | _SEVERAL_WARPS, stamp)

    def read(self, at: Ints, size: int, warp: int, slot: Ints) -> Bytes:
        """Bytes ``[lanes, size]`` at these offsets."""
        index = self._index(at, size, slot, "read")
        self._check_owner(index)
        self._check_messages(index, warp, slot)
        writer = self._writer[index]
        if not writer.all():
            self._report("shared memory: read of bytes that nobody wrote")
        if self._by_other(writer, warp, slot).any():
            self._report("shared memory: race of a read with a write")
        self._note_read(index, warp, slot)
        return self.data[index]

    def write(self, at: Ints, values: Bytes, warp: int, slot: Ints) -> None:
        """Store one row of bytes per offset."""
        index = self._index(at, values.shape[1], slot, "write")
        self._check_owner(index)
        self._check_messages(index, warp, slot)
        if self._by_other(self._writer[index], warp, slot).any():
            self._report("shared memory: race of two writes")
        if self._read_by_other(index, warp, slot):
            self._report("shared memory: race of a write with a read")
        self._writer[index] = self._stamp(warp, slot)
        self.data[index] = values

    def issue_copy(self, at: Ints, size: int, warp: int, slot: Ints) -> None:
        """An asynchronous copy may write its target from now until its thread waits for it."""
        index = self._index(at, size, slot, "asynchronous copy")
        if self._copied[index].any():
            self._report("asynchronous copy: over bytes of another one in flight")
        if self._read_by_other(index, warp, slot):
            self._report("asynchronous copy: over bytes that another thread may still read")
        if self._by_other(self._writer[index], warp, slot).any():
            self._report("asynchronous copy: over bytes that another thread writes")
        self._check_messages(index, warp, slot)
        self._copied[index] = True

    def land_copy(self, at: Ints, values: Bytes, warp: int, slot: Ints) -> None:
        """The bytes of an asynchronous copy arrive."""
        self._copied[self._index(at, values.shape[1], slot, "asynchronous copy")] = False
        self.write(at, values, warp, slot)
