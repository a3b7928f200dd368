"""Methods as they are called: what goes in and what comes out is checked, whatever the method."""

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
    """
    _check(problem)
    with solvable(problem.name):
        result = method.quantize(problem)
    check_result(problem.name, result)
    return result


def candidates_of(method: Method[Any], problem: LinearProblem) -> list[Candidate]:
    """What a method offers to a budget.

    Raises:
        NumericalError: If the problem's weight or inputs cannot be held.
    """
    _check(problem)
    with solvable(problem.name):
        return method.candidates(problem)


def _check(problem: LinearProblem) -> None:
    check_weight(problem.name, problem.weight, problem.choice.grid if problem.choice else problem.scheme.weight)
    if problem.statistics is not None:
        check_tokens(problem.name, float(problem.statistics.abs_max.max()), problem.scheme.activation_bits)
