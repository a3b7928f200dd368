"""Shared memory of blocks that send each other messages, and of warps that have barriers of their own.

Every byte remembers the clock of its last writer, the clock of every warp when it last read, and the box whose message
it is of. Two accesses are in order only if the warp of the second knows of the first (ptx_clocks.py). A message tells
nobody of anything but its own bytes. Whoever waited for its box, or met a warp that did, may touch them.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_boxes import NO_BOX, Box, Boxes, Messages
from emulator.ptx_clocks import Clocks
from emulator.ptx_memory import EPOCH_AT, WARP, Bytes, Ints, Report, SharedMemory

_BY_MESSAGE = 1  # the writer of a byte that came with a message: a warp before it began
_WORD = -1  # instead of a box: the byte is of a box's own word
_BOX_BYTES = 8


class ClusterMemory(SharedMemory):
    """The shared memory of several blocks whose warps have clocks."""

    def __init__(self, size: int, blocks: int, clocks: Clocks, report: Report) -> None:
        super().__init__(size, blocks, report)
        self.clocks, self.boxes = clocks, Boxes(blocks)
        self._reads = np.zeros((clocks.warps, size * blocks), np.int32)  # the clock of each warp when it last read
        self._box = np.zeros(size * blocks, np.int64)  # 1 + the box whose message has a byte

    def check_end(self) -> None:
        """Report what blocks that have ended left undone."""
        self.clocks.check_end()
        if any(not box.full or (box.expected and not box.waited) for box in self.boxes.all):
            self._report("box: its block ends without waiting until it is full")

    def make_box(self, at: Ints, slot: Ints, warp: int, thread: Ints) -> None:
        """`mbarrier.init` by these threads of a warp."""
        index = self._index(at, _BOX_BYTES, slot, "box")
        if np.unique(index).size != index.size:
            self._report("box: two threads make the same one")
        self._box[index] = np.where(
            self._box[index] == _WORD, 0, self._box[index]
        )  # making it twice has its own report
        self.write(at, np.zeros((at.size, _BOX_BYTES), np.uint8), warp, slot)
        self._box[index] = _WORD
        clock = self.clocks.now(slot, warp)
        for lane in range(at.size):
            if not self.boxes.make(int(slot[lane]), int(at[lane]), warp, int(thread[lane]), int(clock[lane])):
                self._report("box: made twice")

    def expect(self, at: Ints, count: Ints, slot: Ints, warp: int) -> None:
        """`mbarrier.arrive.expect_tx`."""
        clock = self.clocks.now(slot, warp)
        for lane in range(at.size):
            box = self.boxes.at(int(slot[lane]), int(at[lane]))
            if box is None or not self._knows(slot[lane], warp, box, box.made):
                self._report("box: bytes are expected where none has been made")
                continue
            if box.arrivals == 0:
                self._report("box: more arrivals than it was made for")
                continue
            box.arrivals -= 1
            box.expected += int(count[lane])
            box.opened = int(clock[lane])
            self.boxes.count(box)

    def fence_boxes(self, slot: Ints, thread: Ints) -> None:
        """`fence.mbarrier_init` by these threads: the boxes that they made can be seen after a cluster's barrier."""
        threads = set(zip(slot.tolist(), thread.tolist(), strict=True))
        for box in self.boxes.all:
            if (box.slot, box.thread) in threads and box.fenced is None:
                box.fenced = int(self.clocks.now(np.array([box.slot]), box.warp)[0])

    def is_full(self, at: Ints, slot: Ints, warp: int) -> NDArray[np.bool_]:
        """`mbarrier.try_wait` by a warp of these blocks; true where there is no box, so that all can end."""
        full = np.ones(at.size, bool)
        for lane, place in enumerate(zip(slot.tolist(), at.tolist(), strict=True)):
            box = self.boxes.at(*place)
            if box is None or not self._knows(slot[lane], warp, box, box.made):
                self._report("box: a warp waits where none has been made")
            elif box.full:
                box.waited = True
                self.clocks.learn_of_box(box.slot, warp, box.number)
            else:
                full[lane] = False
        return full

    def send(self, at: Ints, values: Bytes, box_at: Ints, target: Ints, warp: int, slot: Ints) -> None:
        """`st.async`: a row of bytes per offset, to these blocks and their boxes."""
        index = self._index(at, values.shape[1], target, "message")
        self._index(box_at, _BOX_BYTES, target, "box")
        self._check_send(index, target, warp, slot)
        box = self.boxes.find(target, box_at)
        for which in np.unique(box):
            self._check_box(which, np.count_nonzero(box == which) * values.shape[1], warp, slot[box == which])
        sent = box != NO_BOX
        if sent.any():
            self._box[index[sent]], self._writer[index[sent]] = box[sent, None] + 1, _BY_MESSAGE
            self.boxes.in_flight.append(Messages(index[sent], values[sent], box[sent]))

    def land(self, order: random.Random) -> Ints:
        """Some messages arrive; in the blocks that come back."""
        blocks = []
        for _ in range(order.randint(1, len(self.boxes.in_flight))):
            messages = self.boxes.land(order)
            self.data[messages.index] = messages.values
            blocks.append(messages.index[:, 0] // self._size)
        return np.unique(np.concatenate(blocks))

    def _check_box(self, which: int, count: int, warp: int, slot: Ints) -> None:
        if which == NO_BOX:
            self._report("message: to a box that is not open")
            return
        box = self.boxes.all[which]
        box.sent += count
        if box.arrivals == 0 and box.sent > box.expected:
            self._report("message: more bytes than its box expects")
        if box.fenced is None:
            self._report("message: to a box that no fence shows to other blocks")
            return
        for block in {*slot.tolist()}:
            if (block, warp) in box.open_to:
                continue
            if box.opened is not None and self._knows(block, warp, box, max(box.fenced, box.opened)):
                box.open_to.add((block, warp))
            else:
                self._report("message: to a box that may not be open yet")

    def _knows(self, slot: int, warp: int, box: Box, clock: int) -> bool:
        """Whether a warp knows of what the warp of a box did at a clock."""
        of, place = np.array([box.slot]), np.array([[box.warp]])
        return bool(self.clocks.known(np.array([slot]), warp, of, place)[0, 0] >= clock)

    def _check_send(self, index: Ints, target: Ints, warp: int, slot: Ints) -> None:
        self._check_owner(index)
        box, written = self._box[index], self._writer[index]
        if (box == _WORD).any():
            self._report("message: over the word of a box")
        again = np.unique(index).size != index.size
        if again or self._in_message(box, target, warp, slot).any():
            self._report("message: over bytes of another one")
        unknown = self.clocks.known(slot, warp, target, written & WARP) < written >> EPOCH_AT
        if unknown.any() or (self.clocks.known_of_warps(slot, warp, target) < self._reads[:, index]).any():
            self._report("message: over bytes that their block may still use")

    def _in_message(self, box: Ints, target: Ints, warp: int, slot: Ints) -> NDArray[np.bool_]:
        """Bytes of messages whose box is not known to be full."""
        if not (box > 0).any():
            return np.zeros(box.shape, bool)
        place = self.clocks.warps + self.boxes.number(np.maximum(box - 1, 0))
        return np.asarray((box > 0) & (self.clocks.known(slot, warp, target, place) == 0))

    # What the rules of one block say otherwise.
    def _check_messages(self, index: Ints, warp: int, slot: Ints) -> None:
        box = self._box[index]
        if not box.any():
            return
        if (box == _WORD).any():
            self._report("shared memory: access to the word of a box")
        if self._in_message(box, slot, warp, slot).any():
            self._report("shared memory: access to bytes of a message before a wait for its box")

    def _stamp(self, warp: int, slot: Ints) -> Ints:
        return np.asarray((self.clocks.now(slot, warp) << EPOCH_AT | warp)[:, None])

    def _by_other(self, last: Ints, warp: int, slot: Ints) -> NDArray[np.bool_]:
        return np.asarray(self.clocks.known(slot, warp, slot, last & WARP) < last >> EPOCH_AT)

    def _read_by_other(self, index: Ints, warp: int, slot: Ints) -> bool:
        return bool((self.clocks.known_of_warps(slot, warp, slot) < self._reads[:, index]).any())

    def _note_read(self, index: Ints, warp: int, slot: Ints) -> None:
        self._reads[warp, index] = self.clocks.now(slot, warp)[:, None]

    def write(self, at: Ints, values: Bytes, warp: int, slot: Ints) -> None:
        """Store one row of bytes per offset."""
        super().write(at, values, warp, slot)
        index = self._index(at, values.shape[1], slot, "write")
        if (self._box[index] > 0).any():
            self._box[index] = np.minimum(self._box[index], 0)
