"""Numbers that no layer should hold: every method refuses them in a sentence, or is about as right as rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge import QELinear, Recipe, make_recipe, quantize, quantize_linear
from qe_edge.layers.magnitudes import check_result, check_weight, solvable
from qe_edge.methods import METHODS
from qe_edge.methods.rtn import RoundToNearest
from qe_edge.models.family import Sample
from qe_edge.models.loading import load_model
from qe_edge.numerics.grids import WeightGrid
from qe_edge.numerics.schemes import get_scheme
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.errors import NumericalError, QEError, QENotice, RecipeError

ROUTED = {"shrink": False, "experts": 2, "routed_rank": 4, "shared_rank": 4, "important_channels": 4}
FEW_STEPS = {"refine_epochs": 1, "refine_iterations": 2}
METHOD_OPTIONS = [
    *(
        (name, "default", {"steps": 3} if name in ("omniquant", "masquant", "llmqat", "dlqat") else {})
        for name in METHODS
    ),
    ("svdquant", "paper", {"rounding": "gptq"}),
    ("quarot", "rtn", {}),
    ("omniquant", "paper", {"steps": 3, "scale_steps": 3}),
    ("qe", "paper", {"refine_epochs": 1}),
    ("qe", "default", {**ROUTED, **FEW_STEPS, "refine": "all", "adapter_dtype": "int4"}),
    ("qe", "default", {**ROUTED, **FEW_STEPS, "refine": "router", "adapter_dtype": "float16", "router": "triangle"}),
]


def sound() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(24, 32, generator=drawn) * 0.05, torch.randn(150, 32, generator=drawn)


def with_largest(tensor: Tensor, magnitude: float) -> Tensor:
    return tensor / tensor.abs().max() * magnitude


def changed(tensor: Tensor, place: object, value: Tensor | float) -> Tensor:
    copy = tensor.clone()
    copy[place] = value
    return copy


W, X = sound()
COLUMN = (slice(None), 5)
REFUSED: dict[str, tuple[Tensor, Tensor]] = {
    "weight NaN": (changed(W, (2, 7), float("nan")), X),
    "weight -inf": (changed(W, (2, 7), float("-inf")), X),
    "weight 3e38": (with_largest(W, 3e38), X),
    "one weight 2e6": (changed(W, (2, 7), -2e6), X),
    "weight 7e6": (with_largest(W, 7e6), X),
    "weight 4e-7": (with_largest(W, 4e-7), X),
    "weight denormal": (with_largest(W, 3e-41), X),
    "tokens NaN": (W, changed(X, slice(0, 9), float("nan"))),
    "tokens inf": (W, X + float("inf")),
    "tokens 2e30": (W, with_largest(X, 2e30)),
    "one token 3e38": (W, changed(X, (4, 4), 3e38)),
    "tokens 3e-20": (W, with_largest(X, 3e-20)),
}
RIGHT: dict[str, tuple[Tensor, Tensor]] = {
    "sound": (W, X),
    "weight zero": (W * 0, X),
    "weight zero row": (changed(W, 3, 0.0), X),
    "weight huge row": (changed(W, 3, W[3] * 1e5), X),
    "weight huge column": (changed(W, COLUMN, W[COLUMN] * 1e5), X),
    "weight tiny row": (changed(W, 3, W[3] * 1e-9), X),
    "tokens zero": (W, X * 0),
    "tokens constant": (W, X * 0 + 0.7),
    "tokens huge channel": (W, changed(X, COLUMN, X[COLUMN] * 1e7)),
    "one token huge": (W, changed(X, 3, X[3] * 1e7)),
    "one token": (W, X[:1]),
    "tokens repeated": (W, X[:3].repeat(40, 1)),
    "tokens of rank two": (W, X[:, :2] @ X[:2]),
    "bfloat16": (W.bfloat16(), X.bfloat16()),
    "float64 by columns": (W.double().T.contiguous().T, X.double().T.contiguous().T),
    "wants gradients": (W.clone().requires_grad_(), X.clone().requires_grad_()),
    "odd shape": (W[:7, :19], X[:, :19]),
    "one input": (W[:, :1], X[:, :1]),
}


def refusal(weight: Tensor, tokens: Tensor, recipe: Recipe) -> bool:
    """Whether the layer is refused, and by the name that messages have for it."""
    try:
        quantize_linear(weight, tokens, recipe)
    except NumericalError as error:
        return "'linear'" in error.problem and bool(error.remedy)
    return False


def error(layer: QELinear, weight: Tensor, probe: Tensor) -> float:
    with torch.no_grad():
        wanted = probe.double() @ weight.double().T
        lost = (layer(probe.float()).double() - wanted).square().sum()
    return float(lost / wanted.square().sum().clamp_min(1e-300))


@pytest.mark.parametrize(("method", "preset", "options"), METHOD_OPTIONS)
@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
def test_every_method_refuses_or_is_right(method: str, preset: str, options: dict[str, object], scheme: str) -> None:
    lattice = method == "quipsharp"  # it has no codebook of 3 bits, and takes multiples of eight inputs
    scheme = "w4a16" if lattice and scheme == "w3a16" else scheme
    recipe = make_recipe(method=method, preset=preset, options=options, scheme=scheme)
    for name, (weight, tokens) in REFUSED.items():
        assert refusal(weight, tokens, recipe), name
    for name, (weight, tokens) in RIGHT.items():
        if lattice and weight.shape[1] % 8:
            continue
        layer = quantize_linear(weight, tokens, recipe)
        for part, values in layer.named_buffers():
            assert torch.isfinite(values).all(), (name, part)
        probe = tokens if tokens.any() else X
        plain = quantize_linear(weight, tokens, make_recipe(method="rtn", scheme=scheme))
        assert error(layer, weight, probe) <= 1.5 * error(plain, weight, probe) + 0.02, name


@pytest.mark.parametrize(
    ("weight", "tokens", "bias", "sentence"),
    [
        (W.int(), X, None, r"The weight is strided int32\. Pass a floating point torch\.Tensor \[out, in\]"),
        (W, X > 0, None, r"bool\. Pass a floating point torch\.Tensor \[n, in\]"),
        (W.to(torch.complex64), X, None, "complex64"),
        (W.to_sparse(), X, None, "sparse"),
        (W.to("meta"), X, None, "meta device"),
        (W.numpy(), X, None, "The weight is a ndarray"),
        (W, X[0], None, r"shape \(32,\)"),
        (W[:0], X, None, "do not fit each other"),
        (W, X[:, :31], None, "do not fit each other"),
        (W, X, torch.zeros(23), "A bias of 23 does not fit 24 outputs"),
        (W, X, torch.zeros(24, 1), r"The bias has the shape \(24, 1\)"),
    ],
)
def test_what_is_no_layer_is_refused(weight: Tensor, tokens: Tensor, bias: Tensor | None, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        quantize_linear(weight, tokens, make_recipe(method="rtn"), bias)


def test_a_bias_that_is_not_finite_is_refused() -> None:
    for bad in (torch.full((24,), float("nan")), torch.full((24,), 1e300, dtype=torch.float64)):
        with pytest.raises(NumericalError, match=r"The bias holds NaN or infinity\. Pass a bias"):
            quantize_linear(W, X, make_recipe(method="rtn"), bad)


def test_sentences_name_the_magnitude_and_a_remedy() -> None:
    rtn = make_recipe(method="rtn")
    for weight, sentence in (
        (with_largest(W, 7e6), r"reach 7e\+06, .* cover 4\.59e\+05\. Divide them by a power of two"),
        (with_largest(W, 4e-7), r"at most 4e-07, .* begin at weights of 1e-05\. Multiply them by a power of two"),
    ):
        with pytest.raises(NumericalError, match=sentence):
            quantize_linear(weight, X, rtn)
    with pytest.raises(NumericalError, match=r"reach 2e\+30; above 1e\+09 .* Check the model"):
        quantize_linear(W, with_largest(X, 2e30), rtn)
    with pytest.raises(NumericalError, match=r"at most 5e-07; below 1e-05 .* Multiply the input"):
        quantize_linear(W, with_largest(X, 5e-7), rtn)
    with pytest.raises(NumericalError, match=r"No calibration token reached 'linear'.*without calibration"):
        quantize_linear(W, X[:0], make_recipe(method="gptq"))


def test_tokens_that_are_too_small_for_rounded_inputs_are_fine_for_others() -> None:
    tokens = with_largest(X, 5e-7)
    layer = quantize_linear(W, tokens, make_recipe(method="qe", scheme="w4a16"))
    assert error(layer, W, tokens) < 0.02


def test_few_tokens_that_are_not_finite_are_left_out_with_a_notice() -> None:
    recipe = make_recipe(method="gptq", scheme="w4a16")
    with pytest.warns(QENotice, match="1 of 151 tokens at 'linear' were left out"):
        layer = quantize_linear(W, torch.cat((X, X[:1] * float("inf"))), recipe)
    assert torch.equal(layer.qweight, quantize_linear(W, X, recipe).qweight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_linear(W, X, recipe)


def test_a_budget_is_spent_on_a_single_layer() -> None:
    weight, tokens = torch.randn(64, 64), torch.randn(200, 64)
    cheap, rich = (
        quantize_linear(weight, tokens, make_recipe(method="qe", budget={"bits": bits})) for bits in (5.0, 8.0)
    )
    ranks = [0 if layer.down is None else len(layer.down) for layer in (cheap, rich)]
    assert ranks[0] < ranks[1]
    with pytest.raises(QEError, match="cannot be met"):
        quantize_linear(weight, tokens, make_recipe(method="qe", budget={"bits": 2.0}))


@pytest.mark.parametrize("symmetric", [True, False])
def test_small_groups_may_vanish_only_beside_large_ones(symmetric: bool) -> None:
    grid = WeightGrid(4, 16, symmetric)
    check_weight("layer", changed(W, (slice(None), slice(0, 16)), 1e-8), grid)
    with pytest.raises(NumericalError, match="would become zero"):
        check_weight("layer", changed(with_largest(W, 5e-6), (0, 0), 1.2e-5), grid)
    check_weight("layer", W * 0, grid)
    extremes = torch.tensor([[-3e38, 3e38] * 16])
    with pytest.raises(NumericalError, match=r"reach 3e\+38"):
        check_weight("layer", extremes, grid)


def test_nothing_that_is_not_finite_leaves_a_method() -> None:
    result = RoundToNearest(RoundToNearest.Options()).quantize(LinearProblem("a.b", W, get_scheme("w4a8"), None, 0))
    check_result("a.b", result)
    for bad in (float("nan"), float("inf"), 65504.0):
        broken = replace(result, weight=replace(result.weight, scales=changed(result.weight.scales, 3, bad)))
        with pytest.raises(NumericalError, match=r"Quantizing 'a\.b' gives scales that float16 cannot hold\. Bring"):
            check_result("a.b", broken)
    with pytest.raises(NumericalError, match="inv_omega"):
        check_result("a.b", replace(result, inv_omega=torch.full((32,), float("nan"), dtype=torch.float16)))


@pytest.mark.parametrize(
    "fails", [lambda: torch.linalg.cholesky(-torch.eye(2)), lambda: np.linalg.inv(np.zeros((2, 2)))]
)
def test_a_failed_decomposition_names_the_layer(fails: Callable[[], object]) -> None:
    with (
        pytest.raises(NumericalError, match=r"'a\.b' cannot be decomposed.*choose method rtn"),
        solvable("a.b"),
    ):
        fails()


@pytest.mark.parametrize(("factor", "sentence"), [(1e8, "reach .*cover 4.59e"), (1e-6, "would become zero")])
def test_a_models_weights_beyond_the_scales_are_refused_before_any_work(
    small: str, samples: list[Sample], factor: float, sentence: str
) -> None:
    loaded = load_model(small)
    block = loaded.family.blocks(loaded.model)[-1]
    name, layer = next((n, m) for n, m in block.module.named_modules() if isinstance(m, torch.nn.Linear))
    layer.weight.data.mul_(factor)
    with pytest.raises(NumericalError, match=f"The weights '{block.name}.{name}.weight'.*{sentence}.*--modules"):
        quantize(loaded, make_recipe(method="rtn", modules=(block.group,)), samples)


@pytest.mark.parametrize(("method", "where"), [("rtn", "The output of '{block}'"), ("gptq", "The input of '{layer}'")])
def test_an_activation_that_is_not_finite_is_refused_by_layer_and_sample(
    small: str, samples: list[Sample], method: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qe_edge.quantization.job.BATCH", 2)
    loaded = load_model(small)
    block = next(block for block in loaded.family.blocks(loaded.model) if block.group == "language")
    name, layer = [(n, m) for n, m in block.module.named_modules() if isinstance(m, torch.nn.Linear)][-1]
    calls = []

    def spoil(_module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        calls.append(len(inputs[0]))
        spoilt = inputs[0].clone()
        if len(calls) == 2:  # the second batch holds the third and the fourth sample
            spoilt[1, -1, 0] = float("inf")
        return (spoilt,)

    layer.register_forward_pre_hook(spoil)
    sentence = where.format(block=block.name, layer=f"{block.name}.{name}")
    with pytest.raises(
        NumericalError, match=f"{sentence} is NaN or infinite on calibration sample 4.*get a sound model"
    ):
        quantize(loaded, make_recipe(method=method), samples)
    assert calls == [2, 2]
