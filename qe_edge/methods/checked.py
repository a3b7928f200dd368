"""Calls methods: the problem is checked before, and the result after, for every method alike."""

from __future__ import annotations

from typing import Any

from qe_edge.budget.model import Candidate
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.layers.magnitudes import check_result, check_tokens, check_weight, solvable
from qe_edge.methods.base import Method
from qe_edge.reconstruction.problem import LinearProblem


def quantize_problem(method: Method[Any], problem: LinearProblem) -> QuantizedLinear:
    """The result of a method.

    Raises:
        NumericalError: If the problem's weight or inputs cannot be held, or the result is not finite.

    Example:
        >>> import torch
        >>> from qe_edge.methods.base import MethodOptions
        >>> from qe_edge.methods.rtn import RoundToNearest
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> weight = torch.full((4, 8), float("nan"))
        >>> problem = LinearProblem("mlp", weight, get_scheme("w4a8"), statistics=None, seed=0)
        >>> quantize_problem(RoundToNearest(MethodOptions()), problem)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: The weights 'mlp' hold NaN or infinity. The checkpoint is damaged or
        diverged in training; get a sound one.
    """
    _check(problem)
    with solvable(problem.name):
        result = method.quantize(problem)
    check_result(problem.name, result)
    return result


def candidates_of(method: Method[Any], problem: LinearProblem) -> list[Candidate]:
    """The candidates that a method offers to a budget.

    Raises:
        NumericalError: If the problem's weight or inputs cannot be held.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.calibration.statistics import collect_statistics
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(64, 64), torch.randn(300, 64)
        >>> recipe = qe_edge.make_recipe(method="qe", scheme="w4a8", options={"experts": 0})
        >>> method = recipe.build_method()
        >>> measured = collect_statistics("mlp", weight, tokens, method.request(64, 64), seed=0)
        >>> problem = LinearProblem("mlp", weight, recipe.get_scheme(), measured, seed=0)
        >>> candidates = candidates_of(method, problem)
        >>> candidates[0].stored < candidates[-1].stored, candidates[0].loss > candidates[-1].loss
        (True, True)
    """
    _check(problem)
    with solvable(problem.name):
        return method.candidates(problem)


def _check(problem: LinearProblem) -> None:
    check_weight(problem.name, problem.weight, problem.choice.grid if problem.choice else problem.scheme.weight)
    if problem.statistics is not None:
        check_tokens(problem.name, float(problem.statistics.abs_max.max()), problem.scheme.activation_bits)
