"""What the kit checks, with references: small shapes with tails in every mode, and layers as large as a model's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.plan import Problem, Tactic
from emulator.session import WEIGHTS, problem_of
from prepack.floats import to_bits
from prepack.linear import CanonicalLinear
from prepack.pack import pack
from prepack.reference import qe_linear
from tests.cases import Mode, random_layer, random_tokens
from tests.modes import COMBINATIONS, MODES, TOKENS, shape_for

_MOST_CLUSTER_TOKENS = 4  # kClusterTokens of include/qe_edge/sizes.h

REAL_SIZES = [(1536, 2048), (8960, 1536), (1536, 17920)]
REAL_TOKENS = (1, 3, 8, 9, 17, 64, 65, 300)
REAL_MODES = [
    Mode("w4a8, 64 + 8 x 32", rank_shared=64, rank_routed=32),
    Mode("w4a8, 64 in INT4", adapter_bits=4, rank_shared=64, experts=0),
    *MODES,
]
EQUAL_SCORES = 5e-5  # relative distance of a token's two best scores that sums of float32 may get wrong


@dataclass(frozen=True)
class Request:
    """A layer and the numbers of tokens that it is checked at.

    Attributes:
        mode: How it is quantized.
        k: in_features.
        n: out_features.
        tokens: Numbers of tokens. Rows of x do not depend on each other: a short prompt is the start of a long one.
        seed: Of its contents.
        real: Whether it is as large as a model's; then more tactics run.
    """

    mode: Mode
    k: int
    n: int
    tokens: tuple[int, ...]
    seed: int
    real: bool

    def tactics(self, tokens: int, multiprocessors: int, clusters: int) -> list[Tactic]:
        """What the plan chooses here and for a GPU it knows nothing of, both tiles of the GEMM, and clusters."""
        if tokens > 64:
            rows = (0, 128) if self.mode.act_bits else (0,)
            return [Tactic(height, 0, multiprocessors) for height in rows]
        warps = (0, 2) if self.real else (0,)
        found = [Tactic(0, of_set, known) for of_set in warps for known in (0, multiprocessors)]
        if clusters and tokens <= _MOST_CLUSTER_TOKENS:
            found += [Tactic(0, 0, multiprocessors, blocks) for blocks in ((1, 2, 4, 8) if self.real else (1,))]
        return found


@dataclass(frozen=True)
class Case:
    """A layer with x and its reference.

    Attributes:
        request: What was asked for.
        layer: The canonical layer.
        weights: Packed tensors by the name of their buffer.
        x: ``[tokens, k]``, patterns of the 16-bit type.
        reference: ``[tokens, n]``.
        equal_scores: ``[tokens]``: whether two experts suit the token alike, so that either is right.
    """

    request: Request
    layer: CanonicalLinear
    weights: dict[str, NDArray[Any]]
    x: NDArray[np.uint16]
    reference: NDArray[np.float64]
    equal_scores: NDArray[np.bool_]

    def problem(self, tokens: int) -> Problem:
        """The host code's view of it."""
        return problem_of(self.layer, tokens, self.request.mode.dtype)


def prepare(request: Request) -> Case:
    """Make a layer, pack it, and compute its reference."""
    mode = request.mode
    layer = random_layer(mode, request.k, request.n, seed=request.seed)
    packed = pack(layer, mode.dtype)
    x = random_tokens(mode, max(request.tokens), request.k, seed=request.seed)
    return Case(
        request, layer, {name: array for name in WEIGHTS if (array := getattr(packed, name)) is not None},
        to_bits(x, mode.dtype), qe_linear(layer, x, mode.dtype), equal_scores(layer, x),
    )  # fmt: skip


def equal_scores(layer: CanonicalLinear, x: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which tokens have two best experts that float32 and float64 may order differently."""
    if layer.router is None or layer.num_experts < 2:
        return np.zeros(len(x), np.bool_)
    scores = np.sort(np.abs(x).astype(np.float64) @ layer.router.astype(np.float64), axis=1)
    return np.asarray(scores[:, 1] - scores[:, 0] <= EQUAL_SCORES * scores[:, 0])


def small_requests() -> Iterator[Request]:
    """Every mode and number of tokens of the emulators' tests. Together they launch every kernel that ships."""
    for mode, tokens in [*((mode, tokens) for mode in MODES for tokens in TOKENS), *COMBINATIONS]:
        yield Request(mode, *shape_for(mode, tokens), (tokens,), tokens, real=False)


def real_requests() -> Iterator[Request]:
    """Layers of a real model."""
    for k, n in REAL_SIZES:
        for mode in REAL_MODES:
            if mode.group_size < 0 or k % mode.group_size == 0:
                yield Request(mode, k, n, REAL_TOKENS, k + n, real=True)
