"""Baseline methods against independent float64 references, and what each must improve."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge import QELinear, make_recipe, quantize_linear
from qe_edge.methods import METHODS
from qe_edge.methods.gptq import gptq_round
from qe_edge.methods.smoothquant import smoothing_scale
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid, quantize_weight
from qe_edge.system.errors import NumericalError
from tests.layers import typed_layer
from tests.reference.gptq import gptq
from tests.reference.scaling import awq, smoothquant
from tests.reference.whitened_svd import scaled_svd, whitened_svd

EXACT = {"adapter_dtype": "float32", "shrink": False, "rank": 12}
SHAPES = [(80, 64), (64, 80)]


def quantized(
    method: str, shape: tuple[int, int], scheme: str = "w4a16", **options: object
) -> tuple[QELinear, Tensor, Tensor]:
    weight, x = typed_layer(*shape, 600)
    return quantize_linear(weight, x, make_recipe(method=method, scheme=scheme, options=options)), weight, x


def correction(layer: QELinear) -> np.ndarray:
    down, up = layer.down_matrix(), layer.up_matrix()
    assert down is not None
    assert up is not None
    return (up.double() @ down.double()).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["lqer", "lorc"])
def test_diagonal_corrections_equal_the_svd(method: str, shape: tuple[int, int]) -> None:
    layer, weight, x = quantized(method, shape, **EXACT)
    error = (weight.double() - layer.decoded_weight().double()).numpy()
    scale = np.maximum(x.abs().double().mean(0).numpy(), 1e-4) if method == "lqer" else np.ones(shape[1])
    expected = scaled_svd(error, scale, 12)
    assert np.linalg.norm(correction(layer) - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_aser_equals_the_whitened_svd(shape: tuple[int, int]) -> None:
    layer, weight, x = quantized("aser", shape, outliers=4, **EXACT)
    error = (weight.double() - layer.decoded_weight().double()).numpy()
    expected, _ = whitened_svd(error, x.double().numpy(), 12)
    assert np.linalg.norm(correction(layer) - expected) <= 1e-4 * np.linalg.norm(expected)
    outliers = np.argsort(-(x.abs().mean(0) * weight.abs().mean(0)).numpy())[:4]
    assert layer.inv_omega is not None
    assert set(np.flatnonzero(layer.decoded_weight().abs().sum(0).numpy() == 0)) == set(outliers)
    assert set(np.flatnonzero(layer.inv_omega.numpy() != 1)) <= set(outliers)


@pytest.mark.parametrize("outliers", [0, 4])
def test_quant_experts_without_routing_is_aser(outliers: int) -> None:
    weight, x = typed_layer(80, 64, 600)  # four channels are large for every token: both methods find those
    aser = quantize_linear(
        weight, x, make_recipe(method="aser", scheme="w4a8", options={**EXACT, "outliers": outliers})
    )
    options = {
        "shared_rank": 12,
        "experts": 0,
        "important_channels": outliers,
        "independent_channels": "scale",
        "guard_independent_channels": False,
        "rounding": "nearest",
        "clip": False,
        "adapter_dtype": "float32",
        "shrink": False,
    }
    experts = quantize_linear(weight, x, make_recipe(method="qe", scheme="w4a8", options=options))
    assert torch.allclose(aser(x), experts(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [PER_CHANNEL, 32])
@pytest.mark.parametrize("in_features", [64, 192])
def test_gptq_equals_the_unblocked_reference(in_features: int, group: int, symmetric: bool) -> None:
    weight, x = typed_layer(24, in_features, 800)
    gram = x.double().T @ x.double() / len(x)
    found = gptq_round(weight, gram.numpy(), WeightGrid(4, group, symmetric), 0.01).decode().double().numpy()
    width = in_features if group == PER_CHANNEL else group
    expected = gptq(weight.numpy(), gram.numpy(), 4, width, 0.01, symmetric=symmetric)
    differing = np.abs(found - expected) > 1e-6 * np.abs(expected).max()
    assert differing.mean() < 0.01  # a half-way point may fall on either side


def test_gptq_loses_less_than_rounding_and_survives_dead_channels() -> None:
    weight, x = typed_layer(80, 64, 600)
    x = x @ torch.randn(64, 64)  # correlated channels: what GPTQ makes use of
    x[:, 5] = 0
    recipe = make_recipe(method="gptq", scheme="w3a16")
    layer = quantize_linear(weight, x, recipe)
    rounded = quantize_weight(weight, WeightGrid(3, 128, symmetric=False)).decode()
    assert ((layer(x) - x @ weight.T).norm() < 0.95 * (x @ (rounded - weight).T).norm()).item()
    assert (layer.decoded_weight()[:, 5] == 0).all()


@pytest.mark.parametrize(("scheme", "bits", "group", "symmetric"), [("w4a8", 4, None, True), ("w3a16", 3, 64, False)])
def test_awq_equals_the_float64_reference(scheme: str, bits: int, group: int | None, symmetric: bool) -> None:
    layer, weight, x = quantized("awq", (24, 64), scheme)
    w, tokens = weight.double().numpy(), x.double().numpy()
    expected, losses = awq(w, tokens, 20, bits, group, symmetric=symmetric)
    found = (layer.decoded_weight() * layer.inv_omega.float()).double().numpy() if layer.inv_omega is not None else w
    # the best candidate, or one that a float32 sum cannot tell from it
    assert np.square((w - found) @ tokens.T).sum() <= min(losses) * (1 + 1e-4)
    differing = np.abs(found - expected) > 1e-6 * np.abs(expected).max()
    assert differing.mean() < 0.01  # a half-way point may fall on either side


@pytest.mark.parametrize(("scheme", "bits", "group", "symmetric"), [("w4a8", 4, None, True), ("w4a6", 4, None, True)])
@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_smoothquant_equals_the_float64_reference(
    alpha: float, scheme: str, bits: int, group: int | None, symmetric: bool
) -> None:
    layer, weight, x = quantized("smoothquant", (24, 64), scheme, alpha=alpha)
    assert layer.inv_omega is not None
    found = (layer.decoded_weight() * layer.inv_omega.float()).double().numpy()
    expected = smoothquant(weight.double().numpy(), x.double().numpy(), alpha, bits, group, symmetric=symmetric)
    differing = np.abs(found - expected) > 1e-6 * np.abs(expected).max()
    assert differing.mean() < 0.01


def test_smoothquant_follows_its_formula_and_changes_no_product() -> None:
    layer, weight, x = quantized("smoothquant", (80, 64), "w4a8")
    scale = smoothing_scale(x.abs().amax(0).double().numpy(), weight.abs().amax(0).double().numpy(), 0.5)
    expected = np.sqrt(x.abs().amax(0).numpy() / weight.abs().amax(0).numpy())
    np.testing.assert_allclose(scale, expected, rtol=1e-5)
    assert layer.inv_omega is not None
    np.testing.assert_allclose(layer.inv_omega.float().numpy(), 1 / scale, rtol=1e-3)
    scaled = weight / layer.inv_omega.float()
    half_step = layer.scales.float() / 2
    assert ((layer.decoded_weight() - scaled).abs() <= 1.01 * half_step).all()


@pytest.mark.parametrize(("method", "scheme"), [("awq", "w3a16"), ("smoothquant", "w4a6"), ("gptq", "w3a16")])
def test_methods_that_change_no_bits_beat_rounding(method: str, scheme: str) -> None:
    layer, weight, x = quantized(method, (80, 128), scheme)
    plain, _, _ = quantized("rtn", (80, 128), scheme)
    target = x @ weight.T
    assert (layer(x) - target).norm() < (plain(x) - target).norm()


@pytest.mark.parametrize("method", ["lqer", "aser"])
def test_low_rank_methods_beat_rounding(method: str) -> None:
    layer, weight, x = quantized(method, (80, 128), "w4a6")
    plain, _, _ = quantized("rtn", (80, 128), "w4a6")
    target = x @ weight.T
    assert (layer(x) - target).norm() < (plain(x) - target).norm()


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_takes_degenerate_layers(method: str) -> None:
    recipe = make_recipe(method=method, scheme="w4a8")
    for weight, x in ((torch.zeros(32, 48), torch.randn(60, 48)), (torch.randn(32, 48), torch.zeros(60, 48))):
        y = quantize_linear(weight, x, recipe)(torch.randn(5, 48))
        assert torch.isfinite(y).all()
    bad = torch.randn(60, 48)
    bad[:30] = float("inf")
    if METHODS[method](METHODS[method].Options()).request(32, 48):
        with pytest.raises(NumericalError, match="30 of 60"):
            quantize_linear(torch.randn(32, 48), bad, recipe)
