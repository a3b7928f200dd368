"""Memory of the PTX emulator, with the same rules as shadow.cpp but whole warps at a time.

Races are checked between warps, not inside one: the source emulator, which schedules single threads, does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Report = Callable[[str], None]

_GAP = 1 << 20  # between buffers, so that a stray address falls into no other one


@dataclass
class Buffer:
    """Registered global memory."""

    name: str
    base: int
    data: Bytes
    writable: bool
    written: NDArray[np.bool_]
    writer: Ints = field(default_factory=lambda: np.empty(0, np.int64))


class GlobalMemory:
    """Buffers at made-up addresses."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._next = 1 << 32

    def add(self, array: NDArray[Any], name: str, *, writable: bool) -> int:
        """Register memory and return its made-up address."""
        data = array.view(np.uint8).reshape(-1)
        self._buffers.append(Buffer(name, self._next, data, writable, np.zeros(data.size, bool)))
        self._next += (data.size + 2 * _GAP) // 256 * 256
        return self._buffers[-1].base

    def clear(self) -> None:
        """Forget all buffers."""
        self._buffers.clear()

    def start_launch(self) -> None:
        """Forget who wrote what in the launch before."""
        for buffer in self._buffers:
            buffer.writer = np.full(buffer.data.size if buffer.writable else 0, -1, np.int64)

    def _locate(self, at: Ints, size: int, what: str, report: Report) -> list[tuple[Buffer, NDArray[np.bool_], Ints]]:
        """Which lanes fall into which buffer, and the byte indices there."""
        if (at % size).any():
            report(f"global memory: misaligned {what} of {size} bytes")
        found, rest = [], np.ones(at.size, bool)
        for buffer in self._buffers:
            inside = rest & (at >= buffer.base) & (at + size <= buffer.base + buffer.data.size)
            if inside.any():
                found.append((buffer, inside, (at[inside] - buffer.base)[:, None] + np.arange(size)))
                rest &= ~inside
        if rest.any():
            report(f"global memory: {what} out of bounds{self._neighbour(int(at[rest][0]))}")
        return found

    def _neighbour(self, at: int) -> str:
        for buffer in self._buffers:
            if buffer.base - _GAP // 2 <= at < buffer.base + buffer.data.size + _GAP // 2:
                return f" of {buffer.name}"
        return ""

    def read(self, at: Ints, size: int, block: int, report: Report) -> Bytes:
        """Bytes ``[lanes, size]`` at these addresses; zeros where nothing is."""
        out = np.zeros((at.size, size), np.uint8)
        for buffer, lanes, index in self._locate(at, size, "read", report):
            out[lanes] = buffer.data[index]
            if buffer.writable:
                if not buffer.written[index].all():
                    report(f"global memory: read of bytes of {buffer.name} that nobody wrote")
                writer = buffer.writer[index]
                if ((writer >= 0) & (writer >> 12 != block)).any():
                    report(f"global memory: read of {buffer.name} that another block writes in the same launch")
        return out

    def write(self, at: Ints, values: Bytes, block: int, threads: Ints, report: Report) -> None:
        """Store one row of bytes per address."""
        for buffer, lanes, index in self._locate(at, values.shape[1], "write", report):
            if not buffer.writable:
                report(f"global memory: write to the input {buffer.name}")
                continue
            who = np.broadcast_to(((block << 12) | threads[lanes])[:, None], index.shape)
            before = buffer.writer[index]
            repeated = np.unique(index).size != index.size
            if ((before >= 0) & (before != who)).any() or repeated:
                report(f"global memory: two threads write the same byte of {buffer.name}")
            buffer.writer[index], buffer.written[index] = who, True
            buffer.data[index] = values[lanes]


class SharedMemory:
    """One block's shared memory and what each byte remembers."""

    def __init__(self, size: int, report: Report) -> None:
        self.data = np.full(size, 0xA5, np.uint8)
        self.epoch = 1
        self._report = report
        self._written = np.zeros(size, bool)
        self._copied = np.zeros(size, bool)  # an asynchronous copy owns the byte
        self._writer, self._write_epoch = np.full(size, -1), np.zeros(size, np.int64)
        self._reader, self._read_epoch = np.full(size, -1), np.zeros(size, np.int64)

    def _index(self, at: Ints, size: int, what: str) -> Ints:
        if (at % size).any():
            self._report(f"shared memory: misaligned {what} of {size} bytes")
        bad = (at < 0) | (at + size > self.data.size)
        if bad.any():
            self._report(f"shared memory: {what} out of bounds")
        return np.asarray(np.where(bad, 0, at)[:, None] + np.arange(size))

    def _check_owner(self, index: Ints) -> None:
        if self._copied[index].any():
            self._report("shared memory: access to bytes that an asynchronous copy still owns")

    def _written_by_other(self, index: Ints, warp: int) -> bool:
        writer = self._writer[index]
        return bool(((self._write_epoch[index] == self.epoch) & (writer >= 0) & (writer != warp)).any())

    def _read_by_other(self, index: Ints, warp: int) -> bool:
        return bool(((self._read_epoch[index] == self.epoch) & (self._reader[index] != warp)).any())

    def read(self, at: Ints, size: int, warp: int) -> Bytes:
        """Bytes ``[lanes, size]`` at these offsets."""
        index = self._index(at, size, "read")
        self._check_owner(index)
        if not self._written[index].all():
            self._report("shared memory: read of bytes that nobody wrote")
        if self._written_by_other(index, warp):
            self._report("shared memory: race of a read with a write")
        several = (self._read_epoch[index] == self.epoch) & (self._reader[index] != warp)
        self._reader[index] = np.where(several, -2, warp)
        self._read_epoch[index] = self.epoch
        return self.data[index]

    def write(self, at: Ints, values: Bytes, warp: int) -> None:
        """Store one row of bytes per offset."""
        index = self._index(at, values.shape[1], "write")
        self._check_owner(index)
        if self._written_by_other(index, warp):
            self._report("shared memory: race of two writes")
        if self._read_by_other(index, warp):
            self._report("shared memory: race of a write with a read")
        self._writer[index], self._write_epoch[index], self._written[index] = warp, self.epoch, True
        self.data[index] = values

    def issue_copy(self, at: Ints, size: int, warp: int) -> None:
        """An asynchronous copy may write its target from now until its thread waits for it."""
        index = self._index(at, size, "asynchronous copy")
        if self._copied[index].any():
            self._report("asynchronous copy: over bytes of another one in flight")
        if self._read_by_other(index, warp):
            self._report("asynchronous copy: over bytes that another thread may still read")
        if self._written_by_other(index, warp):
            self._report("asynchronous copy: over bytes that another thread writes")
        self._copied[index] = True

    def land_copy(self, at: Ints, values: Bytes, warp: int) -> None:
        """The bytes of an asynchronous copy arrive."""
        self._copied[self._index(at, values.shape[1], "asynchronous copy")] = False
        self.write(at, values, warp)
