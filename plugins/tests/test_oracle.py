"""Rung 1: the operator in Triton, run by Triton's interpreter, against the float64 reference.

The kernels are compared with that reference too, so a mistake in it would have to be made three times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from oracle.linear import triton_linear
from prepack.linear import CanonicalLinear
from prepack.reference import qe_linear
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.modes import FEWER, FEWER_IDS, MODES, TOKENS, shape_for


def check(mode: Mode, tokens: int) -> None:
    k, n = shape_for(mode, tokens)
    layer, x = random_layer(mode, k, n, seed=tokens), random_tokens(mode, tokens, k)
    error = relative_error(triton_linear(layer, x, mode.dtype), qe_linear(layer, x, mode.dtype))
    assert error <= LIMIT[mode.dtype]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_matches_reference(mode: Mode, tokens: int) -> None:
    check(mode, tokens)


@pytest.mark.parametrize(("mode", "tokens"), FEWER, ids=FEWER_IDS)
def test_every_combination(mode: Mode, tokens: int) -> None:
    check(mode, tokens)


def test_ties_and_non_finite_scores() -> None:
    """Equal scores choose the lowest index; a token whose scores overflow goes to expert 0."""
    mode = Mode("ties", inv_omega=False, experts=4)
    layer, x = random_layer(mode, 264, 40), random_tokens(mode, 3, 264)
    router = layer.router
    assert router is not None
    router[:, 2] = router[:, 1] = router[:, 1] * np.float32(0.25)
    router[5, 3] = np.inf
    x[:, 5] = 0
    x[0, 5] = 1
    with np.errstate(invalid="ignore"):
        assert relative_error(triton_linear(layer, x, "f16"), qe_linear(layer, x, "f16")) <= LIMIT["f16"]


def _with_one_expert_for_another(layer: CanonicalLinear) -> CanonicalLinear:
    assert layer.router is not None
    return replace(layer, router=np.roll(layer.router, 1, axis=1))


def _with_one_zero_point_off(layer: CanonicalLinear) -> CanonicalLinear:
    assert layer.zeros is not None
    zeros = layer.zeros.copy()
    zeros[-1, 0] += 1 if zeros[-1, 0] < 7 else -1
    return replace(layer, zeros=zeros)


def _with_groups_swapped(layer: CanonicalLinear) -> CanonicalLinear:
    return replace(layer, scales=layer.scales[::-1])


def _without_the_last_channel(layer: CanonicalLinear) -> CanonicalLinear:
    q = layer.qweight.copy()
    q[-1] = np.where(q[-1] == 0, 1, 0)
    return replace(layer, qweight=q)


@pytest.mark.parametrize(
    "spoil",
    [_with_one_expert_for_another, _with_one_zero_point_off, _with_groups_swapped, _without_the_last_channel],
)
@pytest.mark.parametrize("act_bits", [8, 0])
def test_a_wrong_reference_is_noticed(spoil: Callable[[CanonicalLinear], CanonicalLinear], act_bits: int) -> None:
    """Small mistakes in the reference are larger than the tolerance, so that agreement says something."""
    mode = Mode("spoilt", act_bits=act_bits, group_size=64, zeros=True)
    layer, x = random_layer(mode, 320, 40), random_tokens(mode, 7, 320)
    y = triton_linear(layer, x, "f16")
    assert relative_error(y, qe_linear(layer, x, "f16")) <= LIMIT["f16"]
    assert relative_error(y, qe_linear(spoil(layer), x, "f16")) > 2 * LIMIT["f16"]
