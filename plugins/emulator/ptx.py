"""The PTX emulator: runs the very PTX that ships, on numpy, as a Machine.

It covers what the source emulator replaces: the inline PTX of kernels/prim_ptx.cuh and what the compiler made of the
rest. Warp w of several blocks is one vector, because numpy takes as long for 32 lanes as for a few hundred; the warps
of a block are interleaved at random, a new order per seed. Not modelled: time, caches, races inside one warp, and weak
memory order between blocks beyond the rules of ptx_memory.py and ptx_cluster.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.plan import Launch
from emulator.ptx_blocks import Blocks
from emulator.ptx_clocks import MOST_IN_CLUSTER
from emulator.ptx_cluster_ops import cluster
from emulator.ptx_collectives import collective
from emulator.ptx_memory import GlobalMemory
from emulator.ptx_memory_ops import memory
from emulator.ptx_ops import Step, arithmetic
from emulator.ptx_order import ordering
from emulator.ptx_text import Instruction, Kernel, PtxError, PtxFile
from emulator.ptx_waits import barrier, box, cluster_barrier
from emulator.ptx_warp import MOST_BLOCKS, DeadlockError, Mask, Warp


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
                if blocks.cluster and order.random() < blocks.haste:
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


# Given the lanes that stand at the instruction and those of them whose guard holds.
_CONTROL: dict[str, Callable[[Warp, Kernel, Instruction, int, Mask, Mask], None]] = {
    "bra": _branch,
    "ret": _return,
    "bar": barrier,
    "barrier": cluster_barrier,
    "mbarrier": box,
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
