"""The PTX emulator: runs the very PTX that ships, on numpy, as a Machine.

It covers what the source emulator replaces: the inline PTX of kernels/prim_ptx.cuh and what the compiler made of the
rest. Warp w of several blocks is one vector, because numpy takes as long for 32 lanes as for a few hundred; the warps
of a block are interleaved at random, a new order per seed. Not modelled: time, caches, races inside one warp, and weak
memory order between blocks beyond the rules of ptx_memory.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.plan import Launch
from emulator.ptx_barriers import Barriers, deadlock
from emulator.ptx_clocks import MOST_IN_CLUSTER, Clocks
from emulator.ptx_cluster import ClusterMemory
from emulator.ptx_cluster_ops import cluster, cluster_memory, try_box
from emulator.ptx_collectives import collective
from emulator.ptx_memory import GlobalMemory, SharedMemory
from emulator.ptx_memory_ops import memory
from emulator.ptx_ops import Step, arithmetic
from emulator.ptx_order import ordering
from emulator.ptx_text import Instruction, Kernel, PtxError, PtxFile
from emulator.ptx_warp import BLOCK, BOX, CLUSTER, LANES, MOST_BLOCKS, NOTHING, DeadlockError, Lanes, Mask, Warp, reader

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
        self.shared = (
            ClusterMemory(launch.shared_bytes, self.count, clocks, self.report)
            if clocks
            else SharedMemory(launch.shared_bytes, self.count, self.report)
        )
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
        if isinstance(self.shared, ClusterMemory):
            self.shared.check_end()
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
        return isinstance(self.shared, ClusterMemory) and bool(self.shared.boxes.in_flight)

    def land(self) -> None:
        """Some messages arrive, and warps go on that wait for a box which they fill."""
        at = self.shared.land(self.order)
        if np.stack([warp.left for warp in self.warps])[:, at].all(axis=0).any():
            self.report("message: its block has already ended")
        self._wake()

    def _waits(self) -> NDArray[np.int8]:
        """What each warp waits for: ``[blocks, warps]``."""
        return np.stack([warp.waiting.reshape(-1, LANES).max(axis=1) for warp in self.warps], axis=1)

    def _wake(self) -> bool:
        """Warps try again whose block has got a full box."""
        if not isinstance(self.shared, ClusterMemory) or not self.shared.boxes.filled:
            return False
        for warp in self.warps:
            warp.resume(np.isin(warp.slot, list(self.shared.boxes.filled)), BOX)
        self.shared.boxes.filled.clear()
        return True


class PtxMachine:
    """Memory plus the kernels of one PTX file.

    Args:
        path: of the file.
        sm_90: run what chips from 9.0 on get, where launches overlap.
    """

    def __init__(self, path: Path, *, sm_90: bool = False) -> None:
        self.file, self.sm_90 = PtxFile(path.read_text(), sm_90=sm_90), sm_90
        self.memory = GlobalMemory()
        self._steps: dict[str, list[Step | None]] = {}

    def add(self, array: NDArray[Any], name: str, *, writable: bool, zeroed: bool = False) -> int:
        """Register memory and return its made-up address; `zeroed` memory may be read before it is written."""
        return self.memory.add(array, name, writable=writable, zeroed=zeroed)

    def clear(self) -> None:
        """Forget all memory."""
        self.memory.clear()

    def launch(self, launch: Launch, seed: int) -> list[str]:
        """Run one kernel over its grid; returns the errors that were found."""
        kernel = self.file.kernel(launch.name)
        if kernel.parameter_bytes != launch.args_bytes:
            return [
                f"the kernel takes {kernel.parameter_bytes} bytes of arguments, the host passes {launch.args_bytes}"
            ]
        beside = max(1, launch.cluster)  # blocks of a cluster
        if beside > MOST_IN_CLUSTER or launch.grid_x % beside:
            return [f"clusters of {beside} blocks in a grid of {launch.grid_x} by {launch.grid_y} blocks"]
        self.memory.start_launch()
        order = random.Random(seed)
        clusters = [
            [(x + rank, y) for rank in range(beside)]
            for y in range(launch.grid_y)
            for x in range(0, launch.grid_x, beside)
        ]
        order.shuffle(clusters)
        errors: list[str] = []
        with np.errstate(all="ignore"):
            count = max(1, MOST_BLOCKS // beside)
            for start in range(0, len(clusters), count):
                places = [place for group in clusters[start : start + count] for place in group]
                blocks = Blocks(self, launch, kernel, places, order)
                try:
                    self._run(blocks, kernel, order)
                except DeadlockError as deadlock:
                    return [*errors, *blocks.errors, str(deadlock)]
                blocks.check_end()
                errors += [error for error in blocks.errors if error not in errors]
        return errors

    def _run(self, blocks: Blocks, kernel: Kernel, order: random.Random) -> None:
        while True:
            runnable = [warp for warp in blocks.warps if warp.can_run]
            if runnable:
                self._advance(order.choice(runnable), kernel, order.randrange(30, 300))
                if blocks.in_flight and order.random() < blocks.haste:
                    blocks.land()
            elif not blocks.go_on():
                return

    def _advance(self, warp: Warp, kernel: Kernel, count: int) -> None:
        """Execute up to `count` instructions of one warp."""
        steps = self._steps.setdefault(kernel.name, [None] * len(kernel.code))
        for _ in range(count):
            if not warp.can_run:
                return
            pc, mask = warp.where()
            instruction = kernel.code[pc]
            active = mask
            if instruction.guard is not None:
                if instruction.guard not in warp.registers:
                    warp.blocks.report(f"register {instruction.guard} is read before it is written")
                    warp.registers[instruction.guard] = np.zeros(warp.lanes.size, bool)
                taken = warp.registers[instruction.guard] ^ instruction.guard_negated
                among = taken if mask is None else taken[mask]
                if not among.any():
                    warp.goto(pc + 1, mask)
                    continue
                if not among.all():
                    active = taken if mask is None else mask & taken
            control = _CONTROL.get(instruction.op[0])
            if control is not None:
                control(warp, kernel, instruction, pc, mask, active)
                continue
            step = steps[pc]
            if step is None:
                step = steps[pc] = _compile(kernel, pc)
            step(warp, active)
            warp.goto(pc + 1, mask)


def _branch(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    target = kernel.labels[instruction.operands[0]]
    if active is mask:
        warp.goto(target, mask)
    else:
        warp.split(pc + 1, mask, target, active)


def _return(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    if active is not mask:
        warp.goto(pc + 1, mask)
    warp.stop(active)


def _barrier(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    warp.together(active, "barrier")
    if instruction.op[1] == "warp":  # lanes run in step anyway
        warp.goto(pc + 1, mask)
        return
    if active is not mask:
        warp.goto(pc + 1, mask)
    if instruction.operands == ("0",):
        warp.wait(pc + 1, active)
    else:
        warp.wait(pc + 1, active, _group(warp, kernel, instruction, active))


def _group(warp: Warp, kernel: Kernel, instruction: Instruction, active: Mask) -> NDArray[np.int8]:
    """What lanes wait for at a named barrier."""
    if instruction.op != ("bar", "sync") or len(instruction.operands) != 2:
        raise PtxError(f"not modelled: `{instruction.text}`")
    lanes = warp.lanes_of(active)
    group, threads = (reader(kernel, each, np.uint32)(warp)[lanes].astype(np.int64) for each in instruction.operands)
    if ((group < 1) | (group > 15)).any():
        warp.blocks.report("named barrier: a number that is not 1 to 15")
        group = np.clip(group, 1, 15)
    of_warps = np.unique(np.stack([warp.slot[lanes], group, threads]), axis=1)
    if np.unique(of_warps[0]).size != of_warps.shape[1]:
        warp.blocks.report("named barrier: lanes of a warp name two")
    warp.blocks.barriers.come(of_warps[0], warp.index, of_warps[1], of_warps[2])
    return (group + BLOCK).astype(np.int8)


def _cluster_barrier(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    warp.together(active, "cluster barrier")
    shared, slot = cluster_memory(warp), np.unique(warp.slot[warp.lanes_of(active)])
    if instruction.op == ("barrier", "cluster", "arrive", "release", "aligned"):
        shared.clocks.arrive(slot, warp.index)
        warp.goto(pc + 1, mask)
        return
    if instruction.op != ("barrier", "cluster", "wait", "acquire", "aligned"):
        raise PtxError(f"not modelled: `{instruction.text}`")
    shared.clocks.start_wait(slot, warp.index)
    if active is not mask:
        warp.goto(pc + 1, mask)
    warp.wait(pc + 1, active, CLUSTER)


def _box(warp: Warp, kernel: Kernel, instruction: Instruction, pc: int, mask: Mask, active: Mask) -> None:
    """Lanes that see a box which is not full stop until another one of their block is."""
    if instruction.op[1] != "try_wait":
        _compile(kernel, pc)(warp, active)
        warp.goto(pc + 1, mask)
        return
    if instruction.op[2:] != ("parity", "shared", "b64") or instruction.operands[2] != "0":
        raise PtxError(f"not modelled: `{instruction.text}`")
    missing = try_box(kernel, instruction, warp, active)
    warp.goto(pc + 1, mask)
    if missing.any():
        warp.wait(pc + 1, missing, BOX)


# Given the lanes that stand at the instruction and those of them whose guard holds.
_CONTROL: dict[str, Callable[[Warp, Kernel, Instruction, int, Mask, Mask], None]] = {
    "bra": _branch,
    "ret": _return,
    "bar": _barrier,
    "barrier": _cluster_barrier,
    "mbarrier": _box,
}


def _compile(kernel: Kernel, pc: int) -> Step:
    instruction = kernel.code[pc]
    step = (
        cluster(kernel, instruction)
        or memory(kernel, instruction)
        or collective(kernel, instruction)
        or ordering(kernel, instruction)
        or arithmetic(kernel, instruction)
    )
    if step is None:
        raise PtxError(f"not modelled: `{instruction.text}`")
    return step
