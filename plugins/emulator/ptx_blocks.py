"""Blocks that run in step in the PTX emulator, and what happens when none of their warps can run."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emulator.plan import Launch
from emulator.ptx_barriers import Barriers, deadlock
from emulator.ptx_clocks import Clocks
from emulator.ptx_cluster import ClusterMemory
from emulator.ptx_memory import SharedMemory
from emulator.ptx_text import Kernel, PtxError
from emulator.ptx_warp import BLOCK, BOX, LANES, NOTHING, DeadlockError, Lanes, Warp

if TYPE_CHECKING:
    from emulator.ptx import PtxMachine

_MOST_ERRORS = 20
Place = tuple[int, int]


class Blocks:
    """Thread blocks that run in step: their warps, their shared memory and the errors seen in them."""

    def __init__(
        self, machine: PtxMachine, launch: Launch, kernel: Kernel, places: list[Place], order: random.Random
    ) -> None:
        self.memory, self.order, self.overlap = machine.memory, order, machine.sm_90
        self.parameters = bytes(launch.args)[: launch.args_bytes]
        self.count = len(places)
        x, y = (np.repeat(np.array(place, np.uint32), LANES) for place in zip(*places, strict=True))
        self.number = y.astype(np.int64) * launch.grid_x + x
        self.errors: list[str] = []
        warps, beside = launch.threads // LANES, max(1, launch.cluster)
        clocks = Clocks(self.count, warps, beside, self.report) if kernel.needs_clocks else None
        self.cluster = ClusterMemory(launch.shared_bytes, self.count, clocks, self.report) if clocks else None
        self.shared = self.cluster or SharedMemory(launch.shared_bytes, self.count, self.report)
        self.barriers = Barriers(self.count, warps, clocks, self.report)
        self.haste = order.choice((0, 0.1, 0.5))  # how likely messages arrive before they must
        same = {"%ntid.x": launch.threads, "%nctaid.x": launch.grid_x}
        self._place: dict[str, Lanes] = {"%ctaid.x": x, "%ctaid.y": y, "%cluster_ctarank": x % np.uint32(beside)} | {
            name: np.full(x.size, value, np.uint32) for name, value in same.items()
        }
        self.warps = [Warp(self, i) for i in range(warps)]

    def report(self, what: str) -> None:
        """Note an error, once, with a limit on how many."""
        if what not in self.errors and len(self.errors) < _MOST_ERRORS:
            self.errors.append(what)

    def special(self, register: str, warp: Warp) -> Lanes:
        """The value of a special register such as ``%tid.x`` in every lane."""
        if register == "%tid.x":
            return warp.thread.astype(np.uint32)
        if register not in self._place:
            raise PtxError(f"special register {register}")
        return self._place[register]

    def check_end(self) -> None:
        """Report blocks that ended without waiting: what follows would not know that the launch in front has ended."""
        if self.cluster:
            self.cluster.check_end()
        waited = np.stack([warp.waited.reshape(-1, LANES).any(axis=1) for warp in self.warps])
        if not waited.any(axis=0).all():
            self.report("a block ends before the launch in front has ended")

    def go_on(self) -> bool:
        """Let a barrier be passed or messages arrive, as chance has it. False when there is nobody left.

        Only called when no warp can run. Raises DeadlockError when all wait for others.
        """
        waits = self._waits()
        choices = list(self.barriers.complete(waits))
        messages = self.in_flight
        if not choices and not messages:
            if self._wake():
                return True
            if (waits != NOTHING).any():
                raise DeadlockError(deadlock(waits))
            return False
        choice = self.order.randrange(len(choices) + messages) if len(choices) + messages > 1 else 0
        if choice == len(choices):
            self.land()
            return True
        code, ready = choices[choice]
        self.barriers.go_on(code, ready)
        self.shared.epoch += code == BLOCK
        for warp in self.warps:
            warp.resume(np.repeat(ready[:, warp.index], LANES), code)
        return True

    @property
    def in_flight(self) -> bool:
        """Whether messages are."""
        return self.cluster is not None and bool(self.cluster.boxes.in_flight)

    def land(self) -> None:
        """If messages are in flight, some arrive, and warps go on that wait for a box which they fill."""
        if self.cluster is None or not self.in_flight:
            return
        at = self.cluster.land(self.order)
        if np.stack([warp.left for warp in self.warps])[:, at].all(axis=0).any():
            self.report("message: its block has already ended")
        self._wake()

    def _waits(self) -> NDArray[np.int8]:
        """What each warp waits for: ``[blocks, warps]``."""
        return np.stack([warp.waiting.reshape(-1, LANES).max(axis=1) for warp in self.warps], axis=1)

    def _wake(self) -> bool:
        """Warps try again whose block has got a full box."""
        if self.cluster is None or not self.cluster.boxes.filled:
            return False
        for warp in self.warps:
            warp.resume(np.isin(warp.slot, list(self.cluster.boxes.filled)), BOX)
        self.cluster.boxes.filled.clear()
        return True
