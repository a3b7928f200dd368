"""Quant Experts: shared and routed low-rank reconstruction of the quantization error (CVPR 2026, arXiv 2602.24059).

The equations and section numbers are those of docs/method.md; every departure from the paper is an option, and the
preset "paper" selects the paper's choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from qe_edge.budget.model import AdapterSize, Candidate
from qe_edge.calibration.clustering import npmi, occurrence_matrix, spectral_clusters
from qe_edge.calibration.importance import split_channels
from qe_edge.calibration.statistics import InputStatistics, StatisticsRequest
from qe_edge.layers.linear import Adapters, QuantizedLinear
from qe_edge.methods.base import Method
from qe_edge.methods.loaq import matched_weight
from qe_edge.methods.qe_options import LayerSize, QuantExpertsOptions, shrink_to_layer
from qe_edge.numerics.grids import WeightGrid, rounds_activations
from qe_edge.numerics.matrices import Matrix, beside, cast, double, picked, to_numpy, to_tensor
from qe_edge.reconstruction.branches import MainBranch, activation_rounding, leave_out_channels, some_tokens
from qe_edge.reconstruction.directions import ErrorSpace, top_eigenvectors, without
from qe_edge.reconstruction.experts import ExpertProblem, assign_by_mass, diagonal_experts, gram_experts
from qe_edge.reconstruction.factors import (
    FACTOR_BITS,
    AdapterDtype,
    join_down_factors,
    store_down_factors,
    store_up_factors,
)
from qe_edge.reconstruction.gptq import Hessian
from qe_edge.reconstruction.modality import assign_by_modality
from qe_edge.reconstruction.offers import offer_candidates
from qe_edge.reconstruction.packed_factors import pack_correction
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.refinement import refine
from qe_edge.reconstruction.rounding import Rounding
from qe_edge.reconstruction.router import normalise_router, ridge_router, routed_residuals, triangle_router
from qe_edge.reconstruction.shrinkage import chosen_strength, shrunk_gram
from qe_edge.reconstruction.token_weights import gradient_weights
from qe_edge.system.errors import NumericalError

DAMPING = 0.01  # of the Gram matrix where a weight is moved to the original's output
COLUMNS = 2048  # input channels that a copy of a matrix has at a time
EVENNESS = 0.1  # share of the weight that all tokens have alike


@dataclass(frozen=True)
class SharedExpert:
    """A main branch with its shared expert.

    Attributes:
        branch: The quantized weight and its error.
        space: Coordinates of the branch's error.
        covariance: `[side, side]` of the error's output, in that space.
        vectors: `[side, r_s + r_r]` its leading directions; the shared expert takes the first r_s.
    """

    branch: MainBranch
    space: ErrorSpace
    covariance: Matrix
    vectors: Matrix

    def objective(self, tokens: Tensor, bits: int) -> float:
        """Sum of squared output errors on tokens `[n, in]`, after a correction with the rank that one token uses.

        It decides whether channels are left out.
        """
        directions, error = self.space.lift(self.vectors), self.branch.error
        hidden = cast(directions.T, error) @ error
        if isinstance(error, Tensor):
            there = tokens @ error.T.float() - (tokens @ hidden.T.float()) @ directions.T.float()
            there += activation_rounding(tokens, self.branch, bits)
            return float(there.square_().sum(dtype=torch.float64))
        left = tokens.numpy() @ self.branch.error.T.astype(np.float32)
        left -= (tokens.numpy() @ hidden.T.astype(np.float32)) @ directions.T.astype(np.float32)
        left += activation_rounding(tokens, self.branch, bits).numpy()
        return float(np.square(left, out=left).sum(dtype=np.float64))


class QuantExperts(Method[QuantExpertsOptions]):
    """Shared expert for channels that matter to most tokens, routed experts for those that matter to some.

    Example:
        >>> import qe_edge, torch
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens = torch.randn(32, 64), torch.randn(400, 16) @ torch.randn(16, 64)
        >>> tokens[:, 7] *= 20  # a channel of outliers
        >>> recipe = qe_edge.make_recipe(method="qe", scheme="w4a16", options={"shared_rank": 16})
        >>> layer = qe_edge.quantize_linear(weight, tokens, recipe)
        >>> exact = tokens @ weight.T
        >>> float((layer(tokens) - exact).norm() / exact.norm()) < 0.0091  # method rtn: 0.09
        True
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "paper": {
            "em_steps": 0,
            "router": "triangle",
            "independent_channels": "scale",
            "guard_independent_channels": False,
            "rounding": "nearest",
            "clip": False,
            "adapter_dtype": "float16",
            "stack_siblings": False,
            "rotate": False,
        },
    }
    on_device: ClassVar[bool] = True

    @property
    def stack_siblings(self) -> bool:
        """Whether q/k/v and gate/up share one set of experts."""
        return self.options.stack_siblings

    @property
    def weighs_tokens(self) -> bool:
        """Whether the option `token_power` is above 0."""
        return self.options.token_power > 0

    def token_weights(self, energy: np.ndarray) -> np.ndarray:
        """A power of the gradients' magnitudes."""
        return gradient_weights(energy, self.options.token_power, EVENNESS)

    @property
    def sees_both_models(self) -> bool:
        """Whether the option `match` is set."""
        return self.options.match

    @property
    def weighs_norms(self) -> bool:
        """Together with `match`."""
        return self.options.match

    def rotates(self, modules: Sequence[str], *, budget: bool) -> bool:
        """Whether the language model is quantized and `rotate` is set; by default, whether a budget is spent."""
        return (budget if self.options.rotate is None else self.options.rotate) and "language" in modules

    def adapter_size(self, out_features: int, in_features: int) -> AdapterSize:
        """Shared and routed experts after shrinking; calibration can only leave experts out."""
        size = shrink_to_layer(self.options, out_features, in_features)
        bits = FACTOR_BITS[self.options.adapter_dtype]
        return AdapterSize(size.shared_rank, size.routed_rank, size.experts, bits)

    def request(self, out_features: int, in_features: int) -> StatisticsRequest | None:
        """Gram matrix, a token sample and the top-k lists."""
        size = shrink_to_layer(self.options, out_features, in_features)
        return StatisticsRequest(gram=True, tokens=self.options.tokens, important=size.important_channels)

    def quantize(self, problem: LinearProblem) -> QuantizedLinear:
        """Quantize one linear problem (docs/method.md, section 1)."""
        problem = self._shrunk(problem)
        if problem.drift is not None:
            weight = matched_weight(problem.weight, to_tensor(problem.gram()), problem.drift, (1.0, 1.0), DAMPING)
            problem = replace(problem, weight=weight)
        statistics = problem.measured()
        size, choice = self._size(problem), problem.choice
        split = split_channels(_lists(statistics), problem.weight.shape[1], size.important_channels, size.experts)
        # channels are taken from the main branch only when there is a shared expert that can carry them: INT4 cannot
        carried = size.shared_rank and self.options.adapter_dtype != "int4"
        left_out = split.independent if carried else split.independent[:0]
        bits = problem.scheme.activation_bits
        if choice:
            left_out = frequent_channels(statistics)[: choice.left_out]
        elif self.options.guard_independent_channels and not rounds_activations(bits):
            left_out = left_out[:0]  # it is the rounding of activations that suffers from large channels
        shared = self._shared_expert(problem, left_out, size)
        if self.options.guard_independent_channels and len(left_out) and not choice:
            plain, tokens = self._shared_expert(problem, left_out[:0], size), some_tokens(statistics)
            shared = min(plain, shared, key=lambda one: one.objective(tokens, bits))
            del plain  # as large as the layer
        adapters = self._adapters(problem, statistics, shared, split.dependent, size)
        branch, refinement = shared.branch, self.options.refinement()
        if adapters and refinement:
            tokens = to_tensor(statistics.tokens)
            target = tokens @ to_tensor(branch.error).float().T
            target += activation_rounding(tokens, branch, problem.scheme.activation_bits)
            gram = to_tensor(problem.gram())
            adapters = refine(adapters, tokens, target, gram, refinement, problem.seed)
        return QuantizedLinear(branch.weight, problem.scheme.activation_bits, branch.inv_omega, adapters)

    def candidates(self, problem: LinearProblem) -> list[Candidate]:
        """Ranks, experts, channels left out and group sizes, with their costs, without dominated candidates."""
        problem = self._shrunk(problem)
        frequent = frequent_channels(problem.measured())
        hessian = Hessian(problem.gram())
        return offer_candidates(
            problem,
            hessian,
            lambda grid, count: self._branch(problem, grid, frequent[:count], hessian, polish=0),  # alike in all
            dtypes=dict.fromkeys((self.options.adapter_dtype, "int4")),
            important=shrink_to_layer(self.options, *problem.weight.shape).important_channels,
            routed=self.options.experts > 0,
        )

    def _shrunk(self, problem: LinearProblem) -> LinearProblem:
        """The problem with its Gram matrix shrunk as the option says."""
        if not self.options.shrinkage:
            return problem
        measured, strength = problem.measured(), self.options.shrinkage
        if strength == "auto":
            strength = chosen_strength(measured.tokens)
        gram = shrunk_gram(problem.gram(), measured.count, strength)
        return replace(problem, statistics=replace(measured, gram=gram))

    def _size(self, problem: LinearProblem) -> LayerSize:
        """Ranks and experts: the budget's choice, or the options shrunk to the layer."""
        size = shrink_to_layer(self.options, *problem.weight.shape)
        if problem.choice is None:
            return size
        given = problem.choice.adapters
        k = min(size.important_channels, problem.weight.shape[1] // (given.experts + 1))
        return LayerSize(given.rank_shared, given.rank_routed, given.experts, k)

    def _branch(
        self, problem: LinearProblem, grid: WeightGrid, left_out: np.ndarray, hessian: Hessian, polish: int
    ) -> MainBranch:
        """The main branch without the channels `left_out`."""
        options, abs_mean = self.options, problem.measured().abs_mean
        rounding = Rounding(options.rounding, options.clip, polish=polish)
        return leave_out_channels(
            problem.weight, grid, left_out, abs_mean, options.independent_channels, rounding, hessian
        )

    def _shared_expert(self, problem: LinearProblem, left_out: np.ndarray, size: LayerSize) -> SharedExpert:
        """Quantize with the channels `left_out` given to the shared expert (5.1, 5.2, 5.5), and fit it (5.3)."""
        grid = problem.choice.grid if problem.choice else problem.scheme.weight
        branch = self._branch(problem, grid, left_out, Hessian(problem.gram(), kept=False), self.options.polish)
        space = ErrorSpace.of(branch.error)
        covariance = space.covariance(problem.gram())
        return SharedExpert(
            branch, space, covariance, top_eigenvectors(covariance, size.shared_rank + size.routed_rank)
        )

    def _adapters(
        self,
        problem: LinearProblem,
        statistics: InputStatistics,
        shared: SharedExpert,
        dependent: np.ndarray,
        size: LayerSize,
    ) -> Adapters | None:
        """Shared and routed factors in storage precision, and the router (5.4, 6, 7)."""
        error, space = shared.branch.error, shared.space
        own = shared.vectors[:, : size.shared_rank]
        size = replace(size, experts=min(size.experts, len(dependent)))
        parts, assigned, outputs = [space.lift(own)], np.zeros(0), None
        if size.experts > 1:
            outputs = space.outputs(cast(statistics.tokens, error))
            routed, assigned = self._routed_directions(problem, statistics, shared, outputs, dependent, size)
            parts += [space.lift(directions) for directions in routed]
        if sum(part.shape[1] for part in parts) == 0:
            return None
        dtype = self._adapter_dtype(problem)
        if dtype == "int4":
            tokens = [None, *(picked(statistics.tokens, assigned == expert) for expert in range(len(parts) - 1))]
            packed = pack_correction(parts, error, Hessian(problem.gram()), tokens)
            up, down, ups, downs = packed.up, packed.down, packed.ups, packed.downs
        else:
            up, ups = store_up_factors(parts, dtype)
            stored = store_down_factors(ups, error, dtype)
            down, downs = join_down_factors(stored), [beside(part.values(), error) for part in stored]
        router = self._router(statistics, space, outputs, ups, downs) if len(parts) > 1 else None
        return Adapters(
            down=down.codes,
            up=up.codes,
            down_scale=down.scale,
            up_scale=up.scale,
            rank_shared=parts[0].shape[1],
            rank_routed=parts[1].shape[1] if len(parts) > 1 else 0,
            num_experts=len(parts) - 1,
            router=router,
        )

    def _adapter_dtype(self, problem: LinearProblem) -> AdapterDtype:
        """Storage of the factors: the budget's choice, or the option."""
        if problem.choice is None:
            return self.options.adapter_dtype
        bits = problem.choice.adapters.factor_bits
        return next(name for name, width in FACTOR_BITS.items() if width == bits)

    def _routed_directions(
        self,
        problem: LinearProblem,
        statistics: InputStatistics,
        shared: SharedExpert,
        outputs: Matrix,
        dependent: np.ndarray,
        size: LayerSize,
    ) -> tuple[list[Matrix], np.ndarray]:
        """Directions `[side, rank]` of every routed expert, and the expert of every sampled token.

        Args:
            problem: The layer.
            statistics: Statistics of its input.
            shared: The main branch with the shared expert.
            outputs: `[sample, side]` the error's output on the sampled tokens, in its own space.
            dependent: Token-dependent channels.
            size: Number of experts and their rank.
        """
        if statistics.importance is None:
            raise NumericalError(f"No important channels were recorded for '{problem.name}'.", "Raise k above 0.")
        reduced = shared.space.reduced
        own = shared.vectors[:, : size.shared_rank]
        occurrence = occurrence_matrix(statistics.importance, dependent, reduced.shape[1])
        fit = ExpertProblem(
            error=_without_directions(reduced, own),
            statistics=statistics,
            channels=dependent,
            labels=spectral_clusters(npmi(occurrence), size.experts, problem.seed),
            channel_weight=_channel_weight(problem.weight),
            experts=size.experts,
            rank=size.routed_rank,
            rho=self.options.rho,
            outputs=outputs - (outputs @ cast(own, outputs)) @ cast(own.T, outputs),
            covariance=without(shared.covariance, own),
        )
        by_modality = self.options.assignment == "modality"
        assigned = assign_by_modality(fit, problem.seed) if by_modality else assign_by_mass(fit)
        if self.options.expert_weighting == "gram":
            return gram_experts(fit, assigned, self.options.em_steps)
        return diagonal_experts(fit, assigned, self.options.expert_weighting), assigned

    def _router(
        self,
        statistics: InputStatistics,
        space: ErrorSpace,
        outputs: Matrix,
        ups: list[Matrix],
        downs: list[Matrix],
    ) -> Tensor:
        """Router `[experts, in]` float16; one common factor keeps it in range without changing any argmin."""
        if self.options.router == "triangle":
            corrections = (up @ down for up, down in zip(ups, downs, strict=True))
            scores = triangle_router(space.error() - next(corrections), corrections)
        else:
            scores = ridge_router(statistics.tokens, routed_residuals(space, statistics.tokens, outputs, ups, downs))
        router = torch.from_numpy(normalise_router(scores, statistics.tokens))
        return router.to(to_tensor(statistics.tokens).device, torch.float16)


def _without_directions(error: Matrix, own: Matrix) -> Matrix:
    """An error `[side, in]` without its part along orthonormal directions `[side, rank]`; few columns at a time."""
    left = error.clone() if isinstance(error, Tensor) else error.copy()
    for start in range(0, error.shape[1], COLUMNS):
        part = left[:, start : start + COLUMNS]
        part -= cast(own @ (own.T @ double(part)), error)
    return left


def _channel_weight(weight: Tensor) -> np.ndarray:
    """Mean magnitude of a weight's columns `[in]` float64."""
    parts = [weight[:, start : start + COLUMNS].abs().mean(0) for start in range(0, weight.shape[1], COLUMNS)]
    return to_numpy(torch.cat(parts).double())


def frequent_channels(statistics: InputStatistics) -> np.ndarray:
    """Channels in order of the number of tokens that they matter to, most first; without channels that matter to none.

    Example:
        >>> from qe_edge.calibration.statistics import collect_statistics
        >>> tokens = torch.tensor([[0.0, 5.0, 1.0], [0.0, 6.0, 0.0], [0.0, 0.0, 9.0]])
        >>> measured = collect_statistics("mlp", torch.ones(2, 3), tokens, StatisticsRequest(important=1), seed=0)
        >>> frequent_channels(measured)
        array([1, 2])
    """
    lists = _lists(statistics)
    return split_channels(lists, len(statistics.abs_mean), len(statistics.abs_mean), 0).independent


def _lists(statistics: InputStatistics) -> np.ndarray:
    """The top-k lists, or lists that name no channel."""
    if statistics.importance is None:
        return np.full((len(statistics.tokens), 1), -1, np.int32)
    return statistics.importance
