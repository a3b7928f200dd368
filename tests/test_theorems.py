"""The method's theorems, as numbered in docs/method.md: identities and bounds that hold for any data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge import QELinear, make_recipe, quantize_linear
from qe_edge.calibration.statistics import InputStatistics, StatisticsRequest, collect_statistics
from qe_edge.methods import qe
from qe_edge.methods.qe_options import QuantExpertsOptions, shrink_to_layer
from qe_edge.numerics.grids import WeightGrid, fake_quantize_activation, quantize_weight
from qe_edge.reconstruction.directions import (
    ErrorSpace,
    whitened_directions,
)
from qe_edge.reconstruction.experts import ExpertProblem, gram_experts, residual_energy
from qe_edge.reconstruction.router import routed_residuals, triangle_router
from tests.layers import outlier_layer, typed_layer
from tests.reference.whitened_svd import scaled_svd, whitened_svd

EXACT = {"adapter_dtype": "float32", "shrink": False, "guard_independent_channels": False}
SMALL = {"shared_rank": 8, "routed_rank": 8, "experts": 4, "important_channels": 4, **EXACT}
SHAPES = [(80, 64), (64, 80)]


def recipe(scheme: str = "w4a16", **options: object) -> object:
    return make_recipe(method="qe", scheme=scheme, options={**SMALL, **options})


def layer(
    shape: tuple[int, int], tokens: int = 600, seed: int = 0, scheme: str = "w4a16", **options: object
) -> tuple[QELinear, Tensor, Tensor]:
    weight, x = typed_layer(*shape, tokens, seed)
    return quantize_linear(weight, x, recipe(scheme, **options)), weight, x


def rounding_error(shape: tuple[int, int], tokens: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Error matrix `[out, in]` of plain rounding, and tokens, float64."""
    weight, x = typed_layer(*shape, tokens)
    error = weight - quantize_weight(weight, WeightGrid(4)).decode()
    return error.double().numpy(), x.double().numpy()


def output_error(error: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(x @ error.T))


@pytest.mark.parametrize("shape", SHAPES)
def test_T1_inverse_free_form_equals_whitened_svd(shape: tuple[int, int]) -> None:
    error, x = rounding_error(shape)
    directions = whitened_directions(error, x.T @ x, 6)
    literal, _ = whitened_svd(error, x, 6)
    assert np.linalg.norm(directions @ (directions.T @ error) - literal) <= 1e-8 * np.linalg.norm(literal)


@pytest.mark.parametrize("shape", SHAPES)
def test_T2_error_is_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    error, x = rounding_error(shape)
    directions = whitened_directions(error, x.T @ x, 6)
    _, sigma = whitened_svd(error, x, 6)
    left = output_error(error - directions @ (directions.T @ error), x)
    assert left == pytest.approx(np.sqrt(np.square(sigma[6:]).sum()), rel=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_T3_whitened_correction_beats_diagonal_weightings(shape: tuple[int, int]) -> None:
    error, x = rounding_error(shape)
    directions = whitened_directions(error, x.T @ x, 6)
    whitened = output_error(error - directions @ (directions.T @ error), x)
    lqer = output_error(error - scaled_svd(error, np.abs(x).mean(0), 6), x)
    lorc = output_error(error - scaled_svd(error, np.ones(shape[1]), 6), x)
    assert whitened <= min(lqer, lorc, output_error(error, x)) * (1 + 1e-9)


def expert_problem(error: np.ndarray, x: np.ndarray, shared: np.ndarray) -> ExpertProblem:
    """Routed experts on what a shared expert with directions `shared` left."""
    statistics = InputStatistics(
        count=len(x),
        dropped=0,
        abs_mean=np.abs(x).mean(0),
        abs_max=np.abs(x).max(0),
        gram=x.T @ x / len(x),
        tokens=x,
        importance=None,
    )
    left = error - shared @ (shared.T @ error)
    empty = np.zeros(0, np.int64)
    return ExpertProblem(left, statistics, empty, empty, np.ones(x.shape[1]), experts=4, rank=6, rho=0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("partition", ["types", "random"])
def test_T4_experts_beat_a_static_adapter_of_the_active_rank_for_any_partition(
    shape: tuple[int, int], partition: str
) -> None:
    error, x = rounding_error(shape)
    shared = whitened_directions(error, x.T @ x, 6)
    static = whitened_directions(error, x.T @ x, 12)
    problem = expert_problem(error, x, shared)
    rng = np.random.default_rng(1)
    assigned = rng.integers(0, 4, len(x)) if partition == "random" else np.abs(x[:, :4]).argmax(1)
    outputs = x @ problem.error.T
    best = output_error(error - static @ (static.T @ error), x) ** 2
    previous = np.inf
    for steps in range(4):
        directions, final = gram_experts(problem, assigned, steps)
        residual = residual_energy(outputs, directions)
        of_assigned, oracle = residual[np.arange(len(x)), final].sum(), residual.min(1).sum()
        assert oracle <= of_assigned * (1 + 1e-9)
        assert of_assigned <= best * (1 + 1e-9)
        assert oracle <= previous * (1 + 1e-9)
        previous = oracle


@pytest.mark.parametrize("shape", SHAPES)
def test_T5_routed_directions_are_orthogonal_to_the_shared_ones(shape: tuple[int, int]) -> None:
    error, x = rounding_error(shape)
    shared = whitened_directions(error, x.T @ x, 6)
    directions, _ = gram_experts(expert_problem(error, x, shared), np.arange(len(x)) % 4, 1)
    assert max(np.abs(direction.T @ shared).max() for direction in directions) < 1e-6


def test_T6_triangle_router_bounds_the_residual() -> None:
    error, x = rounding_error((80, 64))
    shared = whitened_directions(error, x.T @ x, 6)
    problem = expert_problem(error, x, shared)
    directions, _ = gram_experts(problem, np.arange(len(x)) % 4, 0)
    downs = [direction.T @ problem.error for direction in directions]
    router = triangle_router(problem.error, [u @ d for u, d in zip(directions, downs, strict=True)])
    residuals = np.stack(
        [np.abs(x @ (problem.error - u @ d).T).mean(1) for u, d in zip(directions, downs, strict=True)], axis=1
    )
    assert (np.abs(x) @ router.T >= residuals * (1 - 1e-9)).all()


def test_the_papers_router_scores_what_shared_and_routed_experts_leave() -> None:
    papers, weight, _ = layer((80, 64), router="triangle", independent_channels="scale", rounding="nearest")
    down, up, router, omega = papers.down_matrix(), papers.up_matrix(), papers.router, papers.inv_omega
    assert down is not None
    assert up is not None
    assert router is not None
    main = papers.decoded_weight() * (1.0 if omega is None else omega.float())
    ranks = [papers.rank_shared, *[papers.rank_routed] * papers.num_experts]
    shared, *routed = (part_up @ part for part_up, part in zip(up.split(ranks, 1), down.split(ranks), strict=True))
    expected = torch.stack([(weight - main - shared - one).abs().mean(0) for one in routed])
    found = router.float()
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_residuals_for_the_router_are_those_of_the_rounded_experts(shape: tuple[int, int]) -> None:
    error, x = rounding_error(shape)
    drawn = np.random.default_rng(0)
    ups = [drawn.standard_normal((shape[0], rank)) for rank in (6, 4, 4)]
    downs = [up.T @ error / 50 + 0.1 * drawn.standard_normal((up.shape[1], shape[1])) for up in ups]
    left = error - ups[0] @ downs[0]
    expected = [np.linalg.norm(x @ (left - up @ down).T, axis=1) for up, down in zip(ups[1:], downs[1:], strict=True)]
    space = ErrorSpace.of(error)
    found = routed_residuals(space, x, space.outputs(x), ups, downs)
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-9)


def test_T7_scaling_zeroed_channels_changes_only_the_token_scale() -> None:
    weight, x = typed_layer(80, 64, 200)
    zeroed = torch.arange(5)
    kept = weight.clone()
    kept[:, zeroed] = 0
    decoded = quantize_weight(kept, WeightGrid(4)).decode()
    omega = torch.ones(64)
    omega[zeroed] = torch.linspace(1, 9, 5)
    left = (x / omega) @ (weight * omega - decoded).T
    assert torch.allclose(left, x @ (weight - decoded).T, atol=1e-4)
    dropped = x.clone()
    dropped[:, zeroed] = 0
    peaks = [tokens.abs().amax(1) for tokens in (dropped, x / omega, x)]
    assert (peaks[0] <= peaks[1]).all()
    assert (peaks[1] <= peaks[2]).all()


def test_T8_coordinates_of_error_and_input_must_match() -> None:
    weight, tokens = typed_layer(80, 64, 600)
    w, x = weight.double().numpy(), tokens.double().numpy()
    kept = weight.clone()
    kept[:, :5] = 0
    decoded = quantize_weight(kept, WeightGrid(4)).decode().double().numpy()
    omega = np.ones(64)
    omega[:5] = np.linspace(1, 9, 5)
    plain = whitened_directions(w - decoded, x.T @ x, 6)
    scaled_x = x / omega
    scaled = whitened_directions((w - decoded) * omega, scaled_x.T @ scaled_x, 6)
    assert np.linalg.norm(plain @ plain.T - scaled @ scaled.T) < 1e-6
    # T8b: Algorithm 3 to the letter mixes the two and is not better
    mixed = whitened_directions(w - decoded, scaled_x.T @ scaled_x, 6)
    error = w - decoded
    assert output_error(error - plain @ (plain.T @ error), x) <= output_error(error - mixed @ (mixed.T @ error), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_T9_full_rank_is_exact_for_any_input(shape: tuple[int, int]) -> None:
    quantized, weight, _ = layer(shape, shared_rank=512, experts=0)
    x = torch.randn(50, shape[1]) * 3
    assert torch.allclose(quantized(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    quantized, weight, _ = layer(shape, scheme="w4a8", shared_rank=512, experts=0)
    main = x * quantized.inv_omega.float() if quantized.inv_omega is not None else x
    rounding = (main - fake_quantize_activation(main, 8)) @ quantized.decoded_weight().T
    assert torch.allclose(quantized(x), x @ weight.T - rounding, rtol=1e-4, atol=1e-3)


def test_T10_fewer_tokens_than_channels_are_reproduced_exactly() -> None:
    quantized, weight, x = layer((80, 64), tokens=20, shared_rank=20, experts=0)
    y = quantized(x)
    assert torch.isfinite(y).all()
    assert torch.allclose(y, x @ weight.T, rtol=1e-3, atol=1e-3)


def test_T11_permutations_of_channels_and_experts_change_nothing() -> None:
    weight, x = typed_layer(80, 64, 600)
    base = quantize_linear(weight, x, recipe("w4a8"))
    reference = base(x)
    inputs, outputs = torch.randperm(64), torch.randperm(80)
    by_input = quantize_linear(weight[:, inputs], x[:, inputs], recipe("w4a8"))
    assert relative(by_input(x[:, inputs]), reference) < 1e-2
    by_output = quantize_linear(weight[outputs], x, recipe("w4a8"))
    assert relative(by_output(x), reference[:, outputs]) < 1e-2
    assert base.router is not None
    assert base.down is not None
    assert base.up is not None
    order = torch.tensor([2, 0, 3, 1])
    ranks = torch.cat((torch.arange(8), *(8 + 8 * expert + torch.arange(8) for expert in order)))
    base.router, base.down, base.up = base.router[order], base.down[ranks], base.up[:, ranks]
    assert torch.allclose(base(x), reference, rtol=1e-5, atol=1e-5)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_T12_powers_of_two_scale_through() -> None:
    weight, x = typed_layer(80, 64, 600)
    base = quantize_linear(weight, x, recipe("w4a8"))
    scaled = quantize_linear(weight * 4, x, recipe("w4a8"))
    assert torch.equal(scaled.codes(), base.codes())
    assert relative(scaled(x), base(x) * 4) < 1e-3
    wider = quantize_linear(weight, x * 4, recipe("w4a8"))
    assert torch.equal(wider.codes(), base.codes())
    experts = base.expert_index(x)
    assert experts is not None
    assert (wider.expert_index(x * 4) == experts).float().mean() > 0.99


@pytest.mark.parametrize(("scheme", "zeroed_decode"), [("w4a8", True), ("w3a16", True), ("w4a16", True)])
def test_T14_zeroed_columns_decode_to_zero(scheme: str, zeroed_decode: bool) -> None:
    quantized, _, _ = layer((80, 128), scheme=scheme)
    assert quantized.inv_omega is not None
    columns = quantized.inv_omega == 0
    assert columns.sum() == 4
    assert bool((quantized.decoded_weight()[:, columns] == 0).all()) is zeroed_decode


def test_T15_chunks_and_order_of_tokens_do_not_matter() -> None:
    weight, x = typed_layer(80, 64, 600)
    request = StatisticsRequest(gram=True, tokens=8192, important=4)
    whole = collect_statistics("layer", weight, x, request, 0, chunk=600)
    pieces = collect_statistics("layer", weight, x, request, 0, chunk=37)
    assert whole.gram is not None
    assert pieces.gram is not None
    np.testing.assert_allclose(pieces.gram, whole.gram, rtol=1e-5, atol=1e-5 * np.abs(whole.gram).max())
    np.testing.assert_array_equal(pieces.importance, whole.importance)
    np.testing.assert_array_equal(pieces.tokens, whole.tokens)
    shuffled = quantize_linear(weight, x[torch.randperm(600)], recipe("w4a8"))
    assert relative(shuffled(x), quantize_linear(weight, x, recipe("w4a8"))(x)) < 1e-2


def test_T15_a_token_sample_is_independent_of_chunks() -> None:
    weight, x = typed_layer(16, 32, 500)
    request = StatisticsRequest(gram=False, tokens=64, important=4)
    samples = [collect_statistics("layer", weight, x, request, 3, chunk=chunk) for chunk in (500, 64, 7)]
    assert len(samples[0].tokens) == 64
    for sample in samples[1:]:
        np.testing.assert_array_equal(sample.tokens, samples[0].tokens)
        np.testing.assert_array_equal(sample.importance, samples[0].importance)


@pytest.mark.parametrize(
    "options",
    [
        {"important_channels": 0},
        {"experts": 0},
        {"experts": 1},
        {"experts": 16, "important_channels": 64},
        {"shared_rank": 0},
        {"shared_rank": 0, "experts": 0},
        {"shared_rank": 512, "routed_rank": 512},
        {"expert_weighting": "conditional_mean"},
        {"expert_weighting": "omega"},
        {"expert_weighting": "lqer_omega"},
        {"expert_weighting": "mask", "router": "triangle"},
        {"independent_channels": "scale"},
    ],
)
def test_T16_every_edge_of_the_options_runs(options: dict[str, object]) -> None:
    quantized, weight, x = layer((48, 60), scheme="w4a8", **options)
    assert relative(quantized(x), x @ weight.T) < 0.6


@pytest.mark.parametrize("case", ["zero weight", "constant tokens", "one bad token", "few tokens", "zero tokens"])
def test_T16_degenerate_layers_run(case: str) -> None:
    weight, x = typed_layer(48, 64, 300)
    if case == "zero weight":
        weight = torch.zeros_like(weight)
    elif case == "constant tokens":
        x = torch.ones_like(x)
    elif case == "one bad token":
        x[7, 3] = float("nan")
    elif case == "few tokens":
        x = x[:3]
    else:
        x = torch.zeros_like(x)
    quantized = quantize_linear(weight, x, recipe("w4a8"))
    y = quantized(torch.randn(5, 64))
    assert torch.isfinite(y).all()
    if case == "zero weight":
        assert (y == 0).all()


@pytest.mark.parametrize("shape", [(320, 288), (288, 320)])
def test_large_layers_in_float32_leave_as_little_error(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, _ = outlier_layer(*shape, 2500)
    calibration, held_out = x[:2000], x[2000:]
    made = make_recipe(method="qe", scheme="w4a8", options={"shared_rank": 16, "routed_rank": 8, "shrink": False})

    def error() -> float:
        return relative(quantize_linear(weight, calibration, made)(held_out), held_out @ weight.T)

    exact = error()
    monkeypatch.setattr("qe_edge.system.blas.DOUBLE_ENTRIES", 0)
    assert error() < 1.02 * exact


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1536, 8960), (32, 32, 8, 32)),  # the paper's sizes are kept from Qwen2-VL-2B upwards
        ((576, 576), (16, 16, 8, 16)),
        ((256, 256), (8, 8, 4, 8)),
        ((64, 256), (8, 8, 2, 8)),
    ],
)
def test_small_layers_get_smaller_ranks_by_the_stated_rule(
    shape: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    size = shrink_to_layer(QuantExpertsOptions(), *shape)
    assert (size.shared_rank, size.routed_rank, size.experts, size.important_channels) == expected
    adapters = (size.shared_rank + size.experts * size.routed_rank) * sum(shape)
    assert adapters <= 0.5 * shape[0] * shape[1]


def test_T17_ablations_fall_into_the_papers_order(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, _ = outlier_layer(256, 256, 4500)
    calibration, held_out = x[:3000], x[3000:]

    def error(method: str, **options: object) -> float:
        made = make_recipe(method=method, scheme="w4a8", options=options)
        return relative(quantize_linear(weight, calibration, made)(held_out), held_out @ weight.T)

    static = {"rank": 32, "shrink": False, "adapter_dtype": "float16"}
    routed = {
        "shared_rank": 16, "routed_rank": 16, "experts": 8, "important_channels": 8, "shrink": False,
        "adapter_dtype": "float16", "guard_independent_channels": False, "rounding": "nearest", "clip": False,
    }  # fmt: skip
    ours = error("qe", **routed)
    assert ours < 0.9 * error("aser", outliers=8, **static)
    assert error("aser", outliers=8, **static) < 0.9 * error("aser", outliers=0, **static)
    assert error("aser", outliers=0, **static) < 0.9 * error("lqer", **static)
    assert error("lqer", **static) < 0.9 * error("rtn")
    clusters = np.random.default_rng(0).integers(0, 8, 3000)
    as_built = error("qe", **routed, em_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(qe, "assign_by_mass", lambda problem: clusters)
        assert as_built < 0.95 * error("qe", **routed, em_steps=0)
    with monkeypatch.context() as patch:
        patch.setattr(QELinear, "expert_index", lambda layer, tokens: torch.from_numpy(clusters[: len(tokens)]))
        assert ours < 0.8 * error("qe", **routed)
