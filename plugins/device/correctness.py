"""Results of the kernels against the float64 reference.

Every plan runs twice, its launches back to back. Before each run y and the workspace hold bytes of 0xFF, which is NaN.
A result is right when y agrees with the reference, both runs have the same bits, the counters are zero again, and
nothing behind y and the workspace has changed.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.cases import Case, Request, prepare
from device.gpu import ALIGNMENT, Gpu, round_up
from emulator.plan import Buffers, Planner, Tactic
from prepack.floats import from_bits
from tests.cases import LIMIT

GUARD = 4096  # bytes behind y and behind the workspace that no kernel may touch
REROUTED = 0.05  # relative error of a token from which on it went to another expert
WORKERS = max(2, min(8, (os.cpu_count() or 2) // 2))  # that prepare cases ahead; each takes up to 1 GB


@dataclass(frozen=True)
class Result:
    """What was found for one layer, number of tokens and tactic.

    Attributes:
        mode: Name of the mode.
        k: in_features.
        n: out_features.
        tokens: Number of tokens.
        block_rows: Rows of the GEMM's tile; 0 where the plan chose.
        decode_warps: Warps of a decode; 0 where the plan chose.
        multiprocessors: What the plan was told; 0 for nothing.
        clusters: 0 for none, 1 where the plan chose their size, or the number of blocks.
        error: Relative error of all tokens but the rerouted ones; infinite if a value is not finite.
        rerouted: Tokens that went to the other one of two experts with equal scores.
        same_bits: Whether both runs gave the same bits.
        counters_zero: Whether the counters were zero again after each run.
        in_bounds: Whether nothing was written behind y and the workspace.
        passed: Whether all of this is as it should be.
    """

    mode: str
    k: int
    n: int
    tokens: int
    block_rows: int
    decode_warps: int
    multiprocessors: int
    clusters: int
    error: float
    rerouted: int
    same_bits: bool
    counters_zero: bool
    in_bounds: bool
    passed: bool

    def row(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def error_of(
    y: NDArray[np.float32], reference: NDArray[np.float64], equal_scores: NDArray[np.bool_]
) -> tuple[float, int]:
    """Relative error, and how many tokens with equal scores were rerouted, which it leaves out.

    >>> error_of(np.ones((4, 2), np.float32), np.ones((4, 2)), np.zeros(4, bool))
    (0.0, 0)
    """
    if not np.isfinite(y).all():
        return float("inf"), 0
    difference, size = np.linalg.norm(y - reference, axis=1), np.linalg.norm(reference, axis=1)
    rerouted = equal_scores & (difference > REROUTED * size)
    if rerouted.all():
        return 0.0, len(y)
    return float(np.linalg.norm(difference[~rerouted]) / np.linalg.norm(size[~rerouted])), int(rerouted.sum())


@dataclass(frozen=True)
class Checker:
    """Runs plans on the GPU and compares.

    Attributes:
        gpu: The GPU.
        planner: The launch plan.
    """

    gpu: Gpu
    planner: Planner

    def check(self, case: Case) -> Iterator[Result]:
        """One result per number of tokens and tactic."""
        request, weights = case.request, case.weights
        problems = [case.problem(tokens) for tokens in request.tokens]
        y = 2 * max(request.tokens) * request.n
        workspace = max(self.planner.workspace_bytes(problem) for problem in problems)
        counters = max(self.planner.counter_bytes(problem) for problem in problems)
        sizes = [*(array.nbytes for array in weights.values()), case.x.nbytes, y + GUARD, workspace + GUARD, counters]
        with self.gpu.arena(sum(round_up(max(size, 1), ALIGNMENT) for size in sizes)) as arena:
            buffers = Buffers(
                x=arena.put(case.x), y=arena.take(y + GUARD), workspace=arena.take(workspace + GUARD),
                counters=arena.take(counters), **{name: arena.put(array) for name, array in weights.items()},
            )  # fmt: skip
            self.gpu.fill(buffers.counters, 0, counters)
            for tokens in request.tokens:
                for tactic in request.tactics(tokens, self.gpu.multiprocessors, self.gpu.clusters):
                    yield self._result(case, tokens, tactic, buffers)

    def _result(self, case: Case, tokens: int, tactic: Tactic, buffers: Buffers) -> Result:
        mode, n = case.request.mode, case.request.n
        runs = [self._run(case, tokens, tactic, buffers) for _ in range(2)]
        bits = [run[0].view(np.uint16).reshape(tokens, n) for run in runs]
        error, rerouted = error_of(from_bits(bits[0], mode.dtype), case.reference[:tokens], case.equal_scores[:tokens])
        same = bool(np.array_equal(bits[0], bits[1]))
        zero, in_bounds = (all(run[i] for run in runs) for i in (1, 2))
        return Result(
            mode.name, case.request.k, n, tokens, tactic.block_rows, tactic.decode_warps, tactic.multiprocessors,
            tactic.clusters, error, rerouted, same, zero, in_bounds,
            error <= LIMIT[mode.dtype] and same and zero and in_bounds,
        )  # fmt: skip

    def _run(self, case: Case, tokens: int, tactic: Tactic, buffers: Buffers) -> tuple[NDArray[np.uint8], bool, bool]:
        """Bytes of y, whether the counters are zero, and whether the guards are as they were."""
        gpu, problem = self.gpu, case.problem(tokens)
        y_bytes, room = 2 * tokens * case.request.n, self.planner.workspace_bytes(problem)
        counters = self.planner.counter_bytes(problem)
        gpu.fill(buffers.y, 0xFF, y_bytes + GUARD)
        gpu.fill(buffers.workspace, 0xFF, room + GUARD)
        for launch in self.planner.launches(problem, buffers, tactic):
            gpu.launch(launch)
        y = gpu.read(buffers.y, y_bytes + GUARD)
        behind = gpu.read(buffers.workspace + room, GUARD)
        zero = not gpu.read(buffers.counters, counters).any()
        if not zero:
            gpu.fill(buffers.counters, 0, counters)  # or the next plan would be wrong too
        return y[:y_bytes], zero, bool((y[y_bytes:] == 0xFF).all() and (behind == 0xFF).all())


def prepared(requests: Iterable[Request]) -> Iterator[Case]:
    """Cases in order; a few are prepared ahead, in threads."""
    with ThreadPoolExecutor(WORKERS) as pool:
        ahead: deque[Future[Case]] = deque()
        for request in requests:
            ahead.append(pool.submit(prepare, request))
            if len(ahead) > WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def check_all(checker: Checker, requests: Iterable[Request], deadline: float) -> tuple[list[Result], int]:
    """Results until `deadline` (of time.monotonic), and how many layers were left out."""
    left_out = 0

    def in_time() -> Iterator[Request]:
        nonlocal left_out
        for request in requests:
            if time.monotonic() < deadline:
                yield request
            else:
                left_out += 1

    return [result for case in prepared(in_time()) for result in checker.check(case)], left_out
