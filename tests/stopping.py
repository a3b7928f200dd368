"""Runs that are stopped in the middle."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from qe_edge.methods import LinearProblem, Method
from qe_edge.models.loading import LoadedModel
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import Recipe
from qe_edge.system.errors import CommonNotice


class KilledError(Exception):
    """Stands for a kill: raised from the progress report."""


class StopAfter:
    """Raises `KilledError` when this many blocks are done."""

    def __init__(self, blocks: int) -> None:
        self.left = blocks

    def start(self, title: str, total: float) -> None:
        pass

    def advance(self, amount: float, note: str) -> None:
        self.left -= note != "gradients"
        if self.left == 0:
            raise KilledError

    def finish(self) -> None:
        pass


def resumed_after_a_stop(
    method: type[Method], model: str, recipe: Recipe, work: Path, monkeypatch: pytest.MonkeyPatch
) -> LoadedModel:
    """Quantize with Ctrl-C in the second decoder layer, and then to the end."""

    def stop(self: Method, problem: LinearProblem) -> object:
        if "language_model.layers.1" in problem.name:
            raise KeyboardInterrupt
        return solve(self, problem)

    solve = method.quantize
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CommonNotice)
        monkeypatch.setattr(method, "quantize", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, recipe, work=work)
        monkeypatch.setattr(method, "quantize", solve)
        return quantize(model, recipe, work=work, resume=True)[0]
