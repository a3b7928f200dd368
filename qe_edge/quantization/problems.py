"""The linear problems of a run: stacked, weighed and seeded layers, with the statistics of their inputs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.budget.allocation import output_factors
from qe_edge.budget.model import Choice
from qe_edge.calibration.sensitivity import Sensitivity
from qe_edge.calibration.statistics import InputStatistics, StatisticsCollector, StatisticsRequest
from qe_edge.methods import LinearProblem, Method
from qe_edge.models.groups import LinearGroup
from qe_edge.models.stored import StoredWeights
from qe_edge.recipes.recipe import Recipe
from qe_edge.reconstruction.problem import HeadGrams
from qe_edge.system.device import CPU
from qe_edge.system.parallel import map_layers

Result = TypeVar("Result")
NO_HEADS: Mapping[str, HeadGrams] = MappingProxyType({})


@dataclass(frozen=True)
class Measured:
    """Measurements of the original model, made before its first layer is quantized.

    Attributes:
        gradients: Gradients by layer, for budgets: they weigh outputs.
        modality_ratios: MBQ's lambda by layer, for methods that ask for gradients.
        choices: The budget's choice by problem.
        token_energy: Squared gradients of every token by layer, for methods that weigh tokens.
    """

    gradients: Mapping[str, Sensitivity] = field(default_factory=dict)
    modality_ratios: Mapping[str, float] = field(default_factory=dict)
    choices: Mapping[str, Choice] = field(default_factory=dict)
    token_energy: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Member:
    """Layers of one group that are one problem.

    Attributes:
        group: The group.
        numbers: Numbers of its layers in the problem.
        weight: Their weights one below the other, `[out, in]` float32, with rows scaled by `factors`.
        factors: `[out]` powers of two that weigh the outputs; None where nothing weighs them.
    """

    group: LinearGroup
    numbers: list[int]
    weight: Tensor
    factors: Tensor | None

    @property
    def name(self) -> str:
        """Name of the first layer, which stands for all."""
        return self.group.names[self.numbers[0]]

    @property
    def outputs(self) -> list[int]:
        """Output channels of every layer."""
        return [self.group.linears[number].out_features for number in self.numbers]

    @property
    def weights(self) -> list[int]:
        """Number of weights of every layer."""
        return [outputs * self.group.linears[0].in_features for outputs in self.outputs]


Solve = Callable[[Method[Any], LinearProblem], Result]


class Problems:
    """Makes the problems of a block's layers.

    Args:
        recipe: The resolved recipe.
        method: Its method.
        device: Device that computes blocks.
        measured: Measurements of the original model.
        stored: Weights that are in files, and are read when their problem's turn comes.

    Example:
        >>> from qe_edge.models.groups import linear_groups
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> loaded, recipe = load_model("demo"), make_recipe(method="qe")
        >>> problems = Problems(recipe, recipe.build_method(), CPU, Measured())
        >>> block = next(one for one in loaded.family.blocks(loaded.model) if one.group == "language")
        >>> attention = linear_groups(block, loaded.family.siblings)[0]
        >>> (member,) = problems.members(attention)  # query, key and value are one problem
        >>> len(member.numbers), tuple(member.weight.shape)
        (3, (384, 256))
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method[Any],
        device: torch.device,
        measured: Measured,
        stored: StoredWeights | None = None,
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.device = device
        self.at_work = device if method.on_device else CPU  # where problems are solved
        self.measured = measured
        self.stored = stored or StoredWeights()

    def collectors(self, groups: list[LinearGroup]) -> dict[nn.Module, StatisticsCollector]:
        """One collector per shared input, by the layer at which it listens; none if the method wants no statistics."""
        collectors: dict[nn.Module, StatisticsCollector] = {}
        for group in groups:
            weights = [member.weight for member in self.members(group)]
            joint = self.joint_request(weights)
            if joint:
                name, first = group.names[0], group.linears[0]
                collectors[first] = StatisticsCollector(
                    name, first.in_features, weights, joint, self.seed(name), self.at_work, self._token_weights(group)
                )
        return collectors

    def joint_request(self, weights: list[Tensor]) -> StatisticsRequest | None:
        """What to measure on an input for all weights `[out, in]` that read it; None for nothing."""
        requests = [request for weight in weights if (request := self.method.request(*weight.shape))]
        if not requests:
            return None
        return StatisticsRequest(
            gram=any(request.gram for request in requests),
            tokens=max(request.tokens for request in requests),
            important=max(request.important for request in requests),
        )

    def members(self, group: LinearGroup) -> list[Member]:
        """Every linear problem of a group: one of all layers stacked, or one per layer."""
        found = []
        for numbers in group.problems(stacked=self.method.stack_siblings):
            outputs = [group.linears[number].out_features for number in numbers]
            weight, factors = torch.empty(sum(outputs), group.linears[0].in_features), self._factors(group, numbers)
            for number, part in zip(numbers, torch.split(weight, outputs), strict=True):
                name = f"{group.names[number]}.weight"
                part.copy_(self.stored.value(name, group.linears[number].weight))
            if factors is not None:
                weight *= factors.unsqueeze(1)
            found.append(Member(group, numbers, weight, factors))
        return found

    def each(
        self,
        groups: list[LinearGroup],
        collectors: dict[nn.Module, StatisticsCollector],
        solve: Solve[Result],
        heads: Mapping[str, HeadGrams] = NO_HEADS,
    ) -> Iterator[tuple[Member, Result]]:
        """`solve` for every linear problem of a block: large groups one by one, the others side by side."""

        def run(number: int) -> list[tuple[Member, Result]]:
            found = self.of_group(groups[number], collectors, heads)
            return [(member, solve(self.method, problem)) for member, problem in found]

        sizes = [(number, _weights(group), group.linears[0].in_features) for number, group in enumerate(groups)]
        for _, results in map_layers(run, sizes, threads=self.device == CPU):
            yield from results

    def of_group(
        self,
        group: LinearGroup,
        collectors: dict[nn.Module, StatisticsCollector],
        heads: Mapping[str, HeadGrams] = NO_HEADS,
    ) -> Iterator[tuple[Member, LinearProblem]]:
        """The problems of a group, one at a time; its collector is taken out of `collectors`."""
        collector = collectors.pop(group.linears[0], None)
        measured = collector.finish() if collector else None
        for number, member in enumerate(self.members(group)):
            problem = self.problem(member, measured[number] if measured else None)
            own = heads.get(member.name)
            yield member, replace(problem, heads=own.to(self.at_work)) if own else problem

    def problem(self, member: Member, statistics: InputStatistics | None) -> LinearProblem:
        """The linear problem of a member, with all its statistics."""
        return LinearProblem(
            member.name,
            member.weight.to(self.at_work),
            self.recipe.get_scheme(),
            self._own_statistics(statistics, member.weight) if statistics else None,
            self.seed(member.name),
            self.measured.choices.get(member.name),
            self.measured.modality_ratios.get(member.name, 1.0),
            self.at_work,
        )

    def _token_weights(self, group: LinearGroup) -> np.ndarray | None:
        """Weights `[tokens]` of a group's input, by the gradients of all that read it; None where tokens are alike."""
        if not self.measured.token_energy:
            return None
        return self.method.token_weights(np.sum([self.measured.token_energy[name] for name in group.names], axis=0))

    def _factors(self, group: LinearGroup, numbers: list[int]) -> Tensor | None:
        """Powers of two that weigh the outputs of a problem, where gradients are known."""
        if not self.measured.gradients:
            return None
        channels = np.concatenate([self.measured.gradients[group.names[number]].channels for number in numbers])
        return torch.from_numpy(output_factors(channels)).float()

    def _own_statistics(self, statistics: InputStatistics, weight: Tensor) -> InputStatistics:
        """Cut the jointly measured top-k lists to this problem's own k (the lists are sorted, best first)."""
        request = self.method.request(*weight.shape)
        if request is None or statistics.importance is None:
            return statistics
        lists = statistics.importance[:, : request.important] if request.important else None
        return replace(statistics, importance=lists)

    def seed(self, name: str) -> int:
        """A seed for each layer, which does not depend on the order of work."""
        return (self.recipe.seed + zlib.crc32(name.encode())) % 2**31


def _weights(group: LinearGroup) -> int:
    return sum(linear.weight.numel() for linear in group.linears)
