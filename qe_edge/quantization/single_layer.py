"""Quantizing one linear layer whose calibration inputs are in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from qe_edge.budget.allocation import allocate
from qe_edge.budget.model import Offer
from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
from qe_edge.layers.linear import QELinear
from qe_edge.layers.magnitudes import check_weight
from qe_edge.methods.checked import candidates_of, quantize_problem
from qe_edge.recipes.recipe import Recipe
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.device import CPU
from qe_edge.system.errors import NumericalError, RecipeError

NAME = "linear"  # in messages
MAGNITUDES = StatisticsRequest(gram=False, tokens=0)  # so that tokens which a method does not read are checked too


def quantize_linear(weight: Tensor, tokens: Tensor, recipe: Recipe, bias: Tensor | None = None) -> QELinear:
    """Quantize one linear layer.

    Args:
        weight: `[out, in]`, floating point, at least one output and one input.
        tokens: `[n, in]` calibration inputs, floating point; methods without calibration take none (n = 0) as well.
        recipe: Method, scheme, options, seed and budget.
        bias: `[out]` or None.

    Returns:
        The layer, in the CPU's memory.

    Raises:
        NumericalError: If weight or bias is not finite, more than 1 % of the tokens are not (fewer are left out with a
            notice), or the float16 scales cannot hold the weight (`qe_edge.layers.magnitudes`).
        RecipeError: If shapes or dtypes do not fit, or the budget cannot be met.

    Example:
        >>> import qe_edge
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(64, 128), torch.randn(500, 128)
        >>> layer = quantize_linear(weight, tokens, qe_edge.make_recipe(method="gptq", scheme="w4a16"))
        >>> exact = tokens @ weight.T
        >>> f"relative error {float((layer(tokens) - exact).norm() / exact.norm()):.1f}"
        'relative error 0.1'
    """
    for name, tensor, ndim in (("weight", weight, 2), ("tokens", tokens, 2), ("bias", bias, 1)):
        if tensor is not None:
            _check_tensor(name, tensor, ndim)
    if not weight.numel() or tokens.shape[1] != weight.shape[1]:
        raise RecipeError(
            f"Weight {tuple(weight.shape)} and tokens {tuple(tokens.shape)} do not fit each other.",
            "Pass a weight [out, in] and tokens [n, in].",
        )
    if bias is not None:
        if len(bias) != len(weight):
            raise RecipeError(f"A bias of {len(bias)} does not fit {len(weight)} outputs.", "Pass a bias [out].")
        bias = bias.detach().to(CPU)
        if not bool(torch.isfinite(bias.float()).all()):
            raise NumericalError("The bias holds NaN or infinity.", "Pass a bias of finite numbers.")
    method, scheme = recipe.build_method(), recipe.get_scheme()
    method.check_shape(NAME, *weight.shape)
    weight = weight.detach().to(CPU, torch.float32)
    check_weight(NAME, weight, scheme.weight)  # before anything is measured
    request = method.request(*weight.shape)
    statistics = None
    if request or len(tokens):
        statistics = collect_statistics(NAME, weight, tokens, request or MAGNITUDES, recipe.seed)
    problem = LinearProblem(NAME, weight, scheme, statistics, recipe.seed)
    if recipe.budget:
        offers = {NAME: Offer(weight.numel(), 1.0, candidates_of(method, problem))}
        problem = problem.given(allocate(offers, recipe.budget)[NAME])
    return QELinear(quantize_problem(method, problem), bias)


def _check_tensor(name: str, tensor: object, ndim: int) -> None:
    """Refuse a value that is no dense tensor of real numbers with `ndim` dimensions."""
    shape = {"weight": "[out, in]", "tokens": "[n, in]", "bias": "[out]"}[name]
    wanted = f"a floating point torch.Tensor {shape}"
    if not isinstance(tensor, Tensor):
        raise RecipeError(f"The {name} is a {type(tensor).__name__}.", f"Pass {wanted}.")
    if tensor.layout != torch.strided or not tensor.is_floating_point() or tensor.is_meta:
        what = "is on the meta device, without data" if tensor.is_meta else f"is {tensor.layout} {tensor.dtype}"
        raise RecipeError(f"The {name} {what}.".replace("torch.", ""), f"Pass {wanted}; convert it with .float().")
    if tensor.ndim != ndim:
        raise RecipeError(f"The {name} has the shape {tuple(tensor.shape)}.", f"Pass {wanted}.")
