"""T13 of docs/method.md, and what the guard of the refinement promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qe_edge import QELinear, make_recipe, quantize_linear
from qe_edge.layers.linear import Adapters
from qe_edge.methods import qe
from qe_edge.methods.qe_options import QuantExpertsOptions
from qe_edge.reconstruction.refinement import (
    Refinement,
    distances,
    held_out_tokens,
    log_routing,
    refine,
    regression_loss,
    routed_error,
    routing_loss,
    shared_output,
    wanted_routing,
)
from qe_edge.reconstruction.routed_factors import RoutedFactors, routed_factors
from tests.layers import outlier_layer

QUICK = Refinement(factors=True, epochs=4, iterations=25, rate=1e-3, batch=128)
SIDE, TOKENS = 96, 1500
OPTIONS = {
    "shared_rank": 8, "routed_rank": 8, "experts": 4, "important_channels": 6, "shrink": False,
    "guard_independent_channels": False, "rounding": "nearest", "clip": False,
}  # fmt: skip
DTYPES = ["int4", "int8", "float16", "float32"]


def small_experts(experts: int = 3, seed: int = 0) -> tuple[RoutedFactors, Tensor, Tensor]:
    """Experts `[experts, 5, 2]` and `[experts, 2, 7]`, tokens `[40, 7]` and a remaining error `[40, 5]`."""
    drawn = torch.Generator().manual_seed(seed)
    up, down = torch.randn(experts, 5, 2, generator=drawn), torch.randn(experts, 2, 7, generator=drawn)
    return RoutedFactors(up, down), torch.randn(40, 7, generator=drawn), torch.randn(40, 5, generator=drawn) * 3


def stored_layer(dtype: str, **options: object) -> tuple[Adapters, Tensor, Tensor, Tensor]:
    """Stored adapters of a layer in W4A16, tokens, what the correction should add, and the Gram matrix."""
    weight, x, _ = outlier_layer(SIDE, SIDE, TOKENS, types=4, strength=0.5)
    recipe = make_recipe(method="qe", scheme="w4a16", options={**OPTIONS, "adapter_dtype": dtype, **options})
    layer = quantize_linear(weight, x, recipe)
    assert layer.down is not None
    assert layer.up is not None
    adapters = Adapters(
        layer.down, layer.up, layer.down_scale, layer.up_scale, layer.rank_shared, layer.rank_routed,
        layer.num_experts, layer.router,
    )  # fmt: skip
    target = x @ (weight - layer.decoded_weight()).T
    return adapters, x, target, x.double().T @ x.double() / len(x)


def random_router(adapters: Adapters) -> Adapters:
    assert adapters.router is not None
    drawn = torch.randn(adapters.router.shape, generator=torch.Generator().manual_seed(5))
    return replace(adapters, router=(drawn * adapters.router.float().std()).half())


def held_out_error(adapters: Adapters, tokens: Tensor, target: Tensor) -> float:
    held = held_out_tokens(len(tokens))
    return routed_error(adapters, tokens[held], (target - shared_output(adapters, tokens))[held])


def test_T13_identical_experts_are_wanted_alike_and_their_routing_costs_nothing() -> None:
    experts, tokens, left = small_experts()
    experts = RoutedFactors(experts.up[:1].expand(3, -1, -1), experts.down[:1].expand(3, -1, -1))
    d = distances(experts, tokens, left)
    scores = tokens.abs() @ torch.ones(3, 7).T
    uniform = torch.full((40, 3), 1 / 3)
    assert torch.allclose(wanted_routing(d, 1.0), uniform, atol=1e-6)
    assert torch.allclose(log_routing(scores, 1.0).exp(), uniform, atol=1e-6)
    assert abs(float(routing_loss(d, scores, 1.0))) < 1e-6


def test_T13_a_router_that_prefers_one_of_identical_experts_is_penalised() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    assert float(routing_loss(torch.ones(1, 3), scores, 1.0)) > 0.1


def test_T13_only_selected_experts_learn_from_the_regression() -> None:
    experts, tokens, left = small_experts()
    factors = RoutedFactors(experts.up.clone().requires_grad_(), experts.down.clone().requires_grad_())
    chosen = distances(experts, tokens, left).argmin(1)
    only = chosen != 1
    regression_loss(factors, tokens[only], left[only], chosen[only]).backward()
    for gradient in (factors.up.grad, factors.down.grad):
        assert gradient is not None
        assert (gradient[1] == 0).all()
        assert (gradient[0] != 0).any()
        assert (gradient[2] != 0).any()


def test_T13_regression_is_the_mean_of_the_smallest_distances_with_its_gradient() -> None:
    experts, tokens, left = small_experts()
    ours, plain = (
        RoutedFactors(experts.up.clone().requires_grad_(), experts.down.clone().requires_grad_()) for _ in range(2)
    )
    loss = regression_loss(ours, tokens, left, distances(experts, tokens, left).argmin(1))
    loss.backward()
    added = torch.einsum("ni,eri,eor->neo", tokens, plain.down, plain.up)
    expected = (left.unsqueeze(1) - added).abs().mean(2).min(1).values.mean()
    expected.backward()
    assert torch.allclose(loss, expected)
    for one, other in ((ours.up.grad, plain.up.grad), (ours.down.grad, plain.down.grad)):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-6)


def test_T13_the_routing_loss_reaches_the_router_and_no_factor() -> None:
    experts, tokens, left = small_experts()
    factors = RoutedFactors(experts.up.clone().requires_grad_(), experts.down.clone().requires_grad_())
    router = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing_loss(distances(factors, tokens, left), tokens.abs() @ router.T, 1.0).backward()
    assert factors.up.grad is None
    assert factors.down.grad is None
    assert router.grad is not None
    assert (router.grad != 0).any()


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_T13_constants_change_nothing_and_tau_and_sigma_stand_where_the_paper_has_them(tau: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    d, scores = torch.rand(20, 4, generator=drawn).double(), torch.randn(20, 4, generator=drawn).double()
    loss = routing_loss(d, scores, tau)
    assert torch.allclose(routing_loss(d + 7.0, scores - 3.0, tau), loss)
    p = torch.softmax(-(d - d.mean(1, keepdim=True)) / d.std(1, correction=0, keepdim=True) / tau, 1)
    q = torch.softmax(-scores / tau, 1)
    assert torch.allclose(loss, tau**2 * (p * (p.log() - q.log())).sum(1).mean(), rtol=1e-4)


def test_T13_equal_distances_leave_the_loss_and_its_gradient_finite() -> None:
    scores = torch.randn(6, 3).requires_grad_()
    loss = routing_loss(torch.full((6, 3), 2.0), scores, 1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_poor_router_is_repaired(dtype: str, factors: bool) -> None:
    adapters, tokens, target, gram = stored_layer(dtype)
    poor = random_router(adapters)
    refined = refine(poor, tokens, target, gram, replace(QUICK, factors=factors, rate=5e-3), seed=0)
    good, bad = held_out_error(adapters, tokens, target), held_out_error(poor, tokens, target)
    assert good < 0.95 * bad
    # halfway back at least
    assert held_out_error(refined, tokens, target) < (good + bad) / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_poor_experts_are_improved_beyond_what_a_router_can_do(dtype: str) -> None:
    adapters, tokens, target, gram = stored_layer(dtype, em_steps=0, expert_weighting="mask")
    routed = refine(adapters, tokens, target, gram, replace(QUICK, factors=False), seed=0)
    both = refine(adapters, tokens, target, gram, QUICK, seed=0)
    assert held_out_error(both, tokens, target) < 0.99 * held_out_error(routed, tokens, target)


@pytest.mark.parametrize("rate", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_guard_never_lets_the_held_out_error_grow(dtype: str, rate: float) -> None:
    adapters, tokens, target, gram = stored_layer(dtype)
    refined = refine(adapters, tokens, target, gram, replace(QUICK, iterations=5, rate=rate), seed=0)
    assert refined is adapters or held_out_error(refined, tokens, target) < held_out_error(adapters, tokens, target)
    if rate == 1.0:
        assert refined is adapters  # this rate destroys whatever it touches


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shared_expert_and_the_storage_stay(dtype: str) -> None:
    adapters, tokens, target, gram = stored_layer(dtype, em_steps=0, expert_weighting="mask")
    refined = refine(adapters, tokens, target, gram, QUICK, seed=0)
    assert refined is not adapters
    assert torch.equal(shared_output(refined, tokens), shared_output(adapters, tokens))
    for name in ("down", "up", "down_scale", "up_scale", "router"):
        one, other = getattr(refined, name), getattr(adapters, name)
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and one.dtype == other.dtype)
    again = refine(adapters, tokens, target, gram, QUICK, seed=0)
    assert torch.equal(again.up, refined.up)
    assert torch.equal(again.down, refined.down)
    assert again.router is not None
    assert refined.router is not None
    assert torch.equal(again.router, refined.router)


def test_routed_error_is_that_of_the_layer_that_runs() -> None:
    weight, x, _ = outlier_layer(SIDE, SIDE, TOKENS, types=4, strength=0.5)
    layer = quantize_linear(weight, x, make_recipe(method="qe", scheme="w4a16", options=OPTIONS))
    adapters, tokens, target, _ = stored_layer("int8")
    left = target - shared_output(adapters, tokens)
    error = float((layer(x) - x @ weight.T).square().sum())
    assert routed_error(adapters, tokens, left) == pytest.approx(error, rel=1e-3)


def test_held_out_tokens_are_a_tenth_in_runs() -> None:
    held = held_out_tokens(5000)
    assert held.sum() == 500
    assert (held[1:] != held[:-1]).sum() <= 20
    assert held_out_tokens(3).sum() == 0


def test_the_option_refines_a_layer_through_activation_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, _ = outlier_layer(SIDE, SIDE, 2 * TOKENS, types=4, strength=0.5)

    def run(**options: object) -> QELinear:
        recipe = make_recipe(method="qe", scheme="w4a8", options={**OPTIONS, "refine_rate": 3e-3, **options})
        return quantize_linear(weight, x[:TOKENS], recipe)

    # a router without knowledge
    monkeypatch.setattr(qe, "ridge_router", lambda tokens, residuals: torch.randn(4, SIDE).double().numpy())
    torch.manual_seed(0)
    before = run(refine="none")
    torch.manual_seed(0)
    after = run(refine="router", refine_epochs=4)
    torch.manual_seed(0)
    untouched = run(refine="all", refine_epochs=0)
    wanted = x[TOKENS:] @ weight.T
    assert float((after(x[TOKENS:]) - wanted).norm()) < 0.97 * float((before(x[TOKENS:]) - wanted).norm())
    assert after.router is not None
    assert before.router is not None
    assert after.down is not None
    assert before.down is not None
    assert torch.equal(after.down, before.down)
    assert not torch.equal(after.router, before.router)
    assert untouched.router is not None
    assert torch.equal(untouched.router, before.router)


def test_refinement_needs_experts_and_leaves_a_static_correction_alone() -> None:
    adapters, tokens, target, gram = stored_layer("int8", experts=0)
    assert refine(adapters, tokens, target, gram, QUICK, seed=0) is adapters


def test_defaults_are_the_papers() -> None:
    settings = QuantExpertsOptions(refine="all").refinement()
    assert settings == Refinement(factors=True)
    assert (Refinement(factors=True).epochs, Refinement(factors=True).iterations) == (16, 100)
    assert QuantExpertsOptions().refinement() is None


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_experts_come_out_of_the_storage_as_the_layer_computes_with_them(dtype: str) -> None:
    adapters, tokens, target, _ = stored_layer(dtype)
    experts = routed_factors(adapters, SIDE)
    assert experts.up.shape == (4, SIDE, 8)
    left = target - shared_output(adapters, tokens)
    chosen = distances(experts, tokens, left).argmin(1)
    # trained by EM: every expert is the nearest one of some tokens
    assert set(chosen.tolist()) == {0, 1, 2, 3}
