"""SVDQuant against its definition in float64, and what each of its steps must improve."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge import QELinear, make_recipe, quantize_linear
from tests.layers import typed_layer
from tests.reference.svdquant import svdquant

EXACT = {"adapter_dtype": "float32", "shrink": False, "rank": 8, "tokens": 10**6}


def made(
    scheme: str, shape: tuple[int, int] = (48, 64), **options: object
) -> tuple[QELinear, torch.Tensor, torch.Tensor]:
    weight, x = typed_layer(*shape, 500)
    weight[:, 3] *= 12  # something that a low-rank branch can take
    recipe = make_recipe(method="svdquant", scheme=scheme, options={**EXACT, **options})
    return quantize_linear(weight, x, recipe), weight, x


def low_rank(layer: QELinear) -> np.ndarray:
    down, up = layer.down_matrix(), layer.up_matrix()
    assert down is not None
    assert up is not None
    return (up.double() @ down.double()).numpy()


def error(layer: QELinear, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((layer(x) - x @ weight.T).square().sum())


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
@pytest.mark.parametrize(("scheme", "bits", "symmetric"), [("w4a8", 4, True), ("w4a6", 4, True), ("w3a16", 3, False)])
def test_the_alternation_equals_the_reference(shape: tuple[int, int], scheme: str, bits: int, symmetric: bool) -> None:
    layer, weight, x = made(scheme, shape)
    inverse = np.ones(shape[1]) if layer.inv_omega is None else layer.inv_omega.double().numpy()
    group = None if symmetric else layer.group_size
    codes, part, losses = svdquant(
        weight.double().numpy(), x.double().numpy(), inverse, 8, (bits, group, symmetric), layer.activation_bits
    )
    assert error(layer, weight, x) == pytest.approx(min(losses), rel=0.01)
    decoded = layer.decoded_weight().double().numpy()
    differing = np.abs(decoded - codes) > 1e-5 * np.abs(codes).max()
    assert differing.mean() < 0.01  # a half-way point may fall on either side
    # the branch reads the unscaled input: the scale is folded into its down factor
    assert np.linalg.norm(low_rank(layer) - part * inverse) <= 0.01 * np.linalg.norm(part * inverse)


@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
def test_alternating_and_smoothing_help_or_are_left_out(scheme: str) -> None:
    once = error(*made(scheme, iterations=1, grid=0))
    unsmoothed = error(*made(scheme, grid=0))
    assert unsmoothed < once
    assert error(*made(scheme)) <= unsmoothed * 1.02
    assert made(scheme, grid=0)[0].inv_omega is None
    if scheme == "w4a8":
        assert error(*made(scheme)) < 0.7 * unsmoothed  # outlier inputs are what smoothing is for


def test_gptq_on_the_residual_is_kept_when_it_is_better() -> None:
    torch.manual_seed(0)
    weight, x = typed_layer(48, 64, 500)
    x = x @ torch.randn(64, 64)
    recipes = [
        make_recipe(method="svdquant", scheme="w3a16", options={**EXACT, "rounding": rounding})
        for rounding in ("nearest", "gptq")
    ]
    plain, second_order = (error(quantize_linear(weight, x, recipe), weight, x) for recipe in recipes)
    assert second_order < 0.9 * plain


@pytest.mark.parametrize(("dtype", "factor"), [("int8", 1.6), ("float16", 1.05)])
def test_stored_factors_cost_little_because_the_codes_follow_them(dtype: str, factor: float) -> None:
    exact = error(*made("w4a16"))
    stored = error(*made("w4a16", adapter_dtype=dtype))
    assert stored < factor * exact
    assert stored < 0.7 * error(*made("w4a16", rank=0))


def test_siblings_share_the_down_factor_and_rank_zero_is_plain_rounding() -> None:
    layer, weight, x = made("w4a16", rank=0, grid=0)
    assert layer.down is None
    rounded = quantize_linear(weight, x, make_recipe(method="rtn", scheme="w4a16"))
    assert torch.equal(layer.decoded_weight(), rounded.decoded_weight())
    assert make_recipe(method="svdquant").build_method().stack_siblings
    size = make_recipe(method="svdquant", preset="paper").build_method().adapter_size(2048, 2048)
    assert (size.rank_shared, size.factor_bits) == (32, 16)
