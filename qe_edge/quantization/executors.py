"""Where the problems of a model's layers are solved: here, or on the workers of a Ray cluster."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch

from qe_edge.methods import LinearProblem, Method
from qe_edge.models.family import Block
from qe_edge.quantization.problems import Member, Solve
from qe_edge.quantization.ray_workers import import_ray, ray_workers
from qe_edge.recipes.recipe import Recipe
from qe_edge.system.device import CPU, choose_device
from qe_edge.system.errors import RecipeError, TargetError, UnknownNameError
from qe_edge.system.parallel import map_layers

Result = TypeVar("Result")
LOCAL, RAY = "local", "ray"
Solved = list[tuple[Member, Result]]


class Workers(Protocol):
    """Other processes, which may be on other machines.

    Attributes:
        ahead: How many pieces of work keep them all busy.
    """

    ahead: int

    def submit(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Begin a piece of work; what is returned waits for its result."""


def check_executor(name: str) -> None:
    """Refuse an executor that does not exist.

    Args:
        name: "local", "ray" for workers on this machine, or "ray:ADDRESS" for a cluster that runs.

    Raises:
        UnknownNameError: If there is none of this name.

    Example:
        >>> check_executor("ray:auto")
        >>> check_executor("dask")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.UnknownNameError: There is no executor 'dask'. Known: local, ray, ray:ADDRESS.
    """
    if not re.fullmatch(rf"{LOCAL}|{RAY}(:.+)?", str(name)):
        raise UnknownNameError("executor", name, [LOCAL, RAY, f"{RAY}:ADDRESS"])


def check_way(name: str, recipe: Recipe, device: str) -> None:
    """Refuse an executor that cannot do a recipe. No cluster is asked.

    Args:
        name: As `check_executor` takes it.
        recipe: The recipe, whose blocks must not depend on each other.
        device: As of `qe_edge.quantize`.

    Raises:
        UnknownNameError: If there is no such executor.
        RecipeError: If a block of the recipe needs the ones before it.
        TargetError: If Ray is not installed, or if blocks are computed on a GPU.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> check_way("local", make_recipe(method="loaq"), "cpu")
    """
    check_executor(name)
    if name == LOCAL:
        return
    method = recipe.build_method()
    if recipe.flow == "sequential" or method.sees_both_models or method.trains_model:
        raise RecipeError(
            f"Every block of this recipe ({recipe.method}, flow {recipe.flow}) needs the quantized blocks before it: "
            "workers would wait for each other.",
            "Leave out --executor, or choose a method with flow: parallel.",
        )
    chosen = choose_device(device)
    if chosen != CPU:
        raise TargetError(
            f"Workers compute on CPUs, and the device is {chosen}.", "Choose --device cpu, or leave out --executor."
        )
    import_ray()


def open_workers(name: str) -> AbstractContextManager[Workers | None]:
    """The workers of an executor that was checked; None where the work is done here.

    Raises:
        TargetError: If no cluster answers.

    Example:
        >>> with open_workers("local") as workers:
        ...     print(workers)
        None
    """
    return nullcontext() if name == LOCAL else ray_workers(name.removeprefix(RAY).removeprefix(":"))


@dataclass(frozen=True)
class Sent(Generic[Result]):
    """A block whose problems are being solved.

    Attributes:
        block: The block.
        members: What its problems stand for, in their order, without weights.
        solved: Waits for the results.
    """

    block: Block
    members: list[Member]
    solved: Callable[[], list[Result]]


class FarBlocks(Generic[Result]):
    """Sends blocks to workers, and takes the results in the same order.

    Args:
        workers: The workers.
        method: The method that solves.
        solve: What is done with every problem; a function that can be imported.
        done: What is done here with the results of a block.

    Example:
        >>> class Here:
        ...     ahead = 1
        ...     def submit(self, work):
        ...         return work
        >>> from qe_edge.methods.base import MethodOptions
        >>> from qe_edge.methods.rtn import RoundToNearest
        >>> from torch import nn
        >>> seen = []
        >>> method = RoundToNearest(MethodOptions())
        >>> blocks = FarBlocks(Here(), method, solve=None, done=lambda block, _: seen.append(block.name))
        >>> blocks.send(Block("layers.0", nn.Identity(), group="language"), [])
        >>> blocks.finish()
        >>> seen
        ['layers.0']
    """

    def __init__(
        self,
        workers: Workers,
        method: Method[Any],
        solve: Solve[Result],
        done: Callable[[Block, Solved[Result]], None],
    ) -> None:
        self._workers = workers
        self._method = method
        self._solve = solve
        self._done = done
        self._sent: deque[Sent[Result]] = deque()

    def send(self, block: Block, groups: Iterable[Sequence[tuple[Member, LinearProblem]]]) -> None:
        """Send the problems of a block's groups. As many blocks are on their way as there are workers, and one more."""
        members: list[Member] = []
        problems: list[list[LinearProblem]] = []
        for group in groups:
            members += [replace(member, weight=torch.empty(0)) for member, _ in group]
            problems.append([problem for _, problem in group])
        work = partial(solve_groups, self._method, problems, self._solve)
        while len(self._sent) > self._workers.ahead:
            self._take()
        self._sent.append(Sent(block, members, self._workers.submit(work)))

    def finish(self) -> None:
        """Wait for all blocks."""
        while self._sent:
            self._take()

    def _take(self) -> None:
        sent = self._sent.popleft()
        self._done(sent.block, list(zip(sent.members, sent.solved(), strict=True)))


def solve_groups(method: Method[Any], groups: Sequence[Sequence[LinearProblem]], solve: Solve[Result]) -> list[Result]:
    """Solve problems with as many threads as `Problems.each` would: large groups in turn, the others side by side.

    Example:
        >>> import torch
        >>> from qe_edge.methods.base import MethodOptions
        >>> from qe_edge.methods.rtn import RoundToNearest
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> problem = LinearProblem("mlp", torch.ones(4, 8), get_scheme("w4a8"), statistics=None, seed=0)
        >>> solve_groups(RoundToNearest(MethodOptions()), [[problem]], lambda method, one: one.name)
        ['mlp']
    """
    sizes = [
        (number, sum(one.weight.numel() for one in group), group[0].weight.shape[1])
        for number, group in enumerate(groups)
    ]
    found = dict(map_layers(lambda number: [solve(method, one) for one in groups[number]], sizes))
    return [result for number in range(len(groups)) for result in found[number]]
