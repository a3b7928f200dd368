"""Boxes and messages of the PTX emulator: mbarriers of one phase, and what `st.async` brings to them.

A message lands at a random moment, in any order, at the latest when nothing else can happen.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emulator.ptx_clocks import MOST_BOXES
from emulator.ptx_memory import Bytes, Ints
from emulator.ptx_text import PtxError

NO_BOX = -1


@dataclass
class Box:
    """A word of shared memory that counts the bytes of messages."""

    slot: int
    number: int  # in its block
    warp: int  # and thread that made it
    thread: int
    made: int  # the warp's clock when it did, when bytes were expected, and at its fence
    opened: int | None = None
    fenced: int | None = None
    arrivals: int = 1  # that are missing
    expected: int = 0  # bytes
    sent: int = 0
    came: int = 0
    open_to: set[tuple[int, int]] = field(default_factory=set)  # blocks and warps that know it is open
    waited: bool = False  # somebody has seen it full

    @property
    def full(self) -> bool:
        """Whether its phase is complete."""
        return self.arrivals == 0 and self.came >= self.expected


@dataclass
class Messages:
    """Messages of one instruction: which bytes of shared memory get which values, a row a message, and the boxes."""

    index: Ints
    values: Bytes
    box: Ints

    def take(self, which: NDArray[np.bool_]) -> Messages:
        """Some of them."""
        return Messages(self.index[which], self.values[which], self.box[which])


class Boxes:
    """All boxes of several blocks, and the messages in flight."""

    def __init__(self, blocks: int) -> None:
        self.all: list[Box] = []
        self._place: dict[tuple[int, int], int] = {}
        self._made = [0] * blocks
        self.in_flight: list[Messages] = []
        self.filled: set[int] = set()  # blocks that have got a full box since somebody looked

    def make(self, slot: int, at: int, warp: int, thread: int, clock: int) -> bool:
        """A new box; False where there is one."""
        if (slot, at) in self._place:
            return False
        if self._made[slot] == MOST_BOXES:
            raise PtxError(f"a block has more than {MOST_BOXES} boxes")
        self._place[slot, at] = len(self.all)
        self.all.append(Box(slot, self._made[slot], warp, thread, clock))
        self._made[slot] += 1
        return True

    def at(self, slot: int, at: int) -> Box | None:
        """The box at this place of a block."""
        found = self._place.get((slot, at))
        return None if found is None else self.all[found]

    def find(self, slot: Ints, at: Ints) -> Ints:
        """Which box each lane means, or NO_BOX."""
        return np.array([self._place.get(place, NO_BOX) for place in zip(slot.tolist(), at.tolist(), strict=True)])

    def number(self, box: Ints) -> Ints:
        """Which of its block's boxes each one is."""
        return np.array([each.number for each in self.all])[box]

    def count(self, box: Box) -> None:
        """Note that something came, which may have filled it."""
        if box.full:
            self.filled.add(box.slot)

    def land(self, order: random.Random) -> Messages:
        """Some messages that are in flight arrive: all of one instruction, or a part of them."""
        messages = self.in_flight.pop(order.randrange(len(self.in_flight)))
        size = messages.box.size
        if size > 1 and order.random() < 0.5:
            now = np.array([order.random() < 0.5 for _ in range(size)])
            now[order.randrange(size)] = True
            if not now.all():
                self.in_flight.append(messages.take(~now))
                messages = messages.take(now)
        bytes_each = messages.index.shape[1]
        for which, count in zip(*np.unique(messages.box, return_counts=True), strict=True):
            self.all[which].came += int(count) * bytes_each
            self.count(self.all[which])
        return messages
