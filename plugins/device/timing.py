"""Times of the kernels in CUDA graphs, with cold weights: single layers, their first launches, and whole steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from device import shapes
from device.driver import NoMemoryError
from device.gpu import ALIGNMENT, Gpu, round_up
from device.layers import Layer, RandomMemory, Shape, layer_room, small_tensors
from emulator.plan import Launch, Planner, Tactic

Row = dict[str, Any]
COPIED = 256 << 20  # bytes of the copy that measures memory


class CounterError(RuntimeError):
    """Counters were not zero after plans were timed."""


@dataclass(frozen=True)
class Plans:
    """Layers in memory, ready to be launched in a row.

    Attributes:
        launches: Of every layer, in order.
        read_bytes: What all layers have to read and write.
    """

    launches: list[list[Launch]]
    read_bytes: int


def beyond_cache(gpu: Gpu) -> int:
    """Bytes that the copies of a layer exceed together: 2.5 times the L2 cache."""
    return max(16 << 20, 5 * gpu.l2_bytes // 2)


class Stopwatch:
    """Times plans on the GPU.

    Args:
        gpu: The GPU.
        planner: The launch plan.
    """

    def __init__(self, gpu: Gpu, planner: Planner) -> None:
        self._gpu, self._planner = gpu, planner
        self._stack = ExitStack()
        arena = self._stack.enter_context(gpu.arena(RandomMemory.ROOM))
        self._random = RandomMemory(gpu, arena)

    def close(self) -> None:
        """Free the random memory."""
        self._stack.close()

    def measure(
        self, layers: list[Shape], tokens: int, block_rows: int, times: Callable[[Plans], list[float]]
    ) -> tuple[list[float], Plans]:
        """Put layers, x, y, workspace and counters into memory and time their plans.

        Raises:
            NoMemoryError: If they do not fit.
            CounterError: If the counters are not zero afterwards.
        """
        gpu, planner, different = self._gpu, self._planner, set(layers)
        problems = [shape.problem(tokens) for shape in different]
        x, y = (2 * tokens * max(getattr(shape, side) for shape in different) for side in ("k", "n"))
        workspace = max(planner.workspace_bytes(problem) for problem in problems)
        counters = max(planner.counter_bytes(problem) for problem in problems)
        room = sum(round_up(max(size, 1), ALIGNMENT) for size in (x, y, workspace, counters))
        small = {shape: small_tensors(shape) for shape in different}
        room += sum(round_up(array.nbytes, ALIGNMENT) for tensors in small.values() for array in tensors.values())
        tactic = Tactic(block_rows, 0, gpu.multiprocessors, gpu.clusters)
        with gpu.arena(room + sum(layer_room(shape) for shape in layers)) as arena:
            shared = {"x": arena.take(x), "y": arena.take(y), "workspace": arena.take(workspace),
                      "counters": arena.take(counters)}  # fmt: skip
            self._random.fill(shared["x"], x, halves=True)
            gpu.fill(shared["counters"], 0, counters)
            sources = {
                shape: {name: arena.put(array) for name, array in tensors.items()} for shape, tensors in small.items()
            }
            made = [Layer(shape, arena, self._random, sources[shape]) for shape in layers]
            plans = Plans(
                [layer.launches(planner, tokens, tactic, shared) for layer in made],
                sum(shape.read_bytes(tokens) for shape in layers),
            )
            taken = times(plans)
            if gpu.read(shared["counters"], counters).any():
                raise CounterError(f"{layers[0].way.name} at {tokens} tokens leaves counters that are not zero.")
        return taken, plans

    def linear(self, shape: Shape, tokens: int, block_rows: int = 0) -> list[Row]:
        """Microseconds of one layer, and of its plan without the last launches."""
        count = shapes.copies(layer_room(shape), beyond_cache(self._gpu))

        def times(plans: Plans) -> list[float]:
            # The whole plan is first: a part of it then finds the workspace as a whole one leaves it.
            longest = len(plans.launches[0])
            parts = [longest] if block_rows else range(longest, 0, -1)  # only the last launch knows of rows
            return [self._graph_time(plans, launches) / count for launches in parts]

        taken, plans = self.measure([shape] * count, tokens, block_rows, times)
        longest = len(plans.launches[0])
        return [
            {
                "k": shape.k, "n": shape.n, "tokens": tokens, "mode": shape.way.name, "block_rows": block_rows,
                "launches": longest - left_out, "of_launches": longest, "kernel": plans.launches[0][-1 - left_out].name,
                "copies": count, "bytes": plans.read_bytes // count, "microseconds": microseconds,
            }
            for left_out, microseconds in enumerate(taken)
        ]  # fmt: skip

    def step(self, layers: list[Shape], tokens: int) -> list[Row]:
        """Microseconds of different layers in a row; one row."""
        taken, plans = self.measure(layers, tokens, 0, lambda plans: [self._graph_time(plans, None)])
        return [{
            "tokens": tokens, "mode": layers[0].way.name, "launches": sum(map(len, plans.launches)),
            "bytes": plans.read_bytes, "microseconds": taken[0],
        }]  # fmt: skip

    def _graph_time(self, plans: Plans, launches: int | None) -> float:
        chosen = [launch for plan in plans.launches for launch in plan[:launches]]

        def queue() -> None:
            for launch in chosen:
                self._gpu.launch(launch)

        return self._gpu.graph_time(queue)


def copied_gb_per_second(gpu: Gpu) -> float:
    """Bytes read and written per second by a copy on the GPU, in units of 10^9."""
    with gpu.arena(2 * COPIED) as arena:
        source, to = arena.take(COPIED), arena.take(COPIED)
        gpu.copy_in(source, np.zeros(COPIED, np.uint8))
        return 2e-3 * COPIED / gpu.graph_time(lambda: gpu.copy(to, source, COPIED))


def step_rows(watch: Stopwatch, deadline: float) -> Iterator[Row]:
    """Whole steps, the layers of all blocks, until `deadline` (of time.monotonic), or {"what": ..., "skipped": why}."""
    for model, pairs in shapes.MODELS.items():
        for tokens in shapes.STEP_TOKENS:
            for way in shapes.WAYS:
                layers = [Shape(k, n, way) for k, n in pairs] * shapes.BLOCKS
                what = f"step of {model} at {tokens} tokens, {way.name}"
                for row in _in_time(what, deadline, partial(watch.step, layers, tokens)):
                    yield {"model": model, "blocks": shapes.BLOCKS, **row} if "mode" in row else row


def linear_rows(watch: Stopwatch, deadline: float) -> Iterator[Row]:
    """Single layers until `deadline` (of time.monotonic), or {"what": ..., "skipped": why}."""
    for tokens in shapes.TOKENS:
        for model, pairs in shapes.MODELS.items():
            for k, n in pairs:
                for way in shapes.WAYS:
                    for block_rows in (0, 128) if tokens >= 256 and way.act_bits else (0,):
                        what = f"{k} x {n} at {tokens} tokens, {way.name}"
                        measure = partial(watch.linear, Shape(k, n, way), tokens, block_rows)
                        for row in _in_time(what, deadline, measure):
                            yield {"model": model, **row} if "mode" in row else row


def _in_time(what: str, deadline: float, measure: Callable[[], list[Row]]) -> list[Row]:
    if time.monotonic() > deadline:
        return [{"what": what, "skipped": "The time was up."}]
    try:
        return measure()
    except NoMemoryError:
        return [{"what": what, "skipped": "The GPU has too little memory."}]
