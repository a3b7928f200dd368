"""The candidates that one layer offers to a budget: every size of correction with its bits and its error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from qe_edge.budget.model import AdapterSize, Candidate, Choice
from qe_edge.budget.sizes import predicted_bits
from qe_edge.numerics.grids import WeightGrid, rounds_activations
from qe_edge.numerics.matrices import to_numpy
from qe_edge.numerics.schemes import Scheme
from qe_edge.reconstruction.branches import MainBranch, activation_rounding, some_tokens
from qe_edge.reconstruction.designs import ErrorSpectrum, RoutedDesign, routed_losses
from qe_edge.reconstruction.factors import FACTOR_BITS, AdapterDtype
from qe_edge.reconstruction.gptq import Hessian
from qe_edge.reconstruction.packed_factors import packing_loss
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.reconstruction.ranks import RANK_STEP

LARGEST_RANK = 128  # that the kernels take; on small layers half the smaller side
LEFT_OUT = (0, 8, 16, 32)  # channels that the main branch may leave to the correction where it rounds activations
DESIGNS = tuple(
    RoutedDesign(shared, routed, experts) for shared in (0, 16, 32) for routed, experts in ((8, 4), (8, 8), (16, 8))
)
TYPICAL_RANK = 16  # at which main branches are compared for the trials of routing


@dataclass(frozen=True)
class _Variant:
    """What is known of one main branch; its error, as large as the weight, is not kept.

    Attributes:
        scheme: Its number grids.
        left_out: Channels left to the correction.
        scaled: Whether its input has channel scales.
        noise: Energy per token that rounding its activations costs.
        total: Energy per token of its error.
        left: Energy per token that static corrections of rank 0, 1, 2 ... leave.
        excess: By storage of the factors, the share that rounding them loses of what they capture.
    """

    scheme: Scheme
    left_out: int
    scaled: bool
    noise: float
    total: float
    left: list[float]
    excess: dict[AdapterDtype, float]

    def typical(self) -> float:
        """Energy per token left by a static correction of the typical rank."""
        return self.noise + self.left[min(TYPICAL_RANK, len(self.left) - 1)]


def offer_candidates(
    problem: LinearProblem,
    hessian: Hessian,
    make_branch: Callable[[WeightGrid, int], MainBranch],
    *,
    dtypes: Iterable[AdapterDtype],
    important: int,
    routed: bool,
) -> list[Candidate]:
    """Candidates of one linear problem, without dominated ones.

    Args:
        problem: The problem, with tokens and top-k lists.
        hessian: Its Gram matrix.
        make_branch: Main branch for a grid and a number of channels left out.
        dtypes: Storages of the factors.
        important: k, channels per token-independent set.
        routed: Whether routed experts are tried, on the main branch that is best without them.

    Example:
        >>> import numpy as np
        >>> from qe_edge.calibration.statistics import StatisticsRequest, collect_statistics
        >>> from qe_edge.numerics.schemes import get_scheme
        >>> from qe_edge.reconstruction.branches import leave_out_channels
        >>> _ = torch.manual_seed(0)
        >>> weight, tokens, scheme = torch.randn(64, 64), torch.randn(500, 64), get_scheme("w4a16")
        >>> measured = collect_statistics("mlp", weight, tokens, StatisticsRequest(important=4), seed=0)
        >>> problem = LinearProblem("mlp", weight, scheme, measured, seed=0)
        >>> def branch(grid: WeightGrid, count: int) -> MainBranch:
        ...     return leave_out_channels(weight, grid, np.arange(count), measured.abs_mean, "drop")
        >>> options = {"dtypes": ["int8"], "important": 4, "routed": False}
        >>> candidates = offer_candidates(problem, Hessian(measured.gram), branch, **options)
        >>> cheapest, best = candidates[0], candidates[-1]
        >>> cheapest.choice.grid.bits, best.choice.grid.bits, best.choice.adapters.rank_shared
        (3, 4, 32)
        >>> cheapest.stored < best.stored and cheapest.loss > best.loss
        True
    """
    variants, best, spectrum = _variants(problem, hessian, make_branch, tuple(dtypes))
    found = []
    for variant in variants:
        losses = [(RoutedDesign(rank, 0, 0), variant.left[rank]) for rank in range(0, len(variant.left), RANK_STEP)]
        if routed and variant is best:
            weight = to_numpy(problem.weight.abs().mean(0).double())
            trials = routed_losses(spectrum, problem.measured(), weight, important, DESIGNS, problem.seed)
            losses += zip(DESIGNS, trials, strict=True)
        for dtype, excess in variant.excess.items():
            for design, loss in losses:
                size = AdapterSize(design.shared, design.routed, design.experts, FACTOR_BITS[dtype])
                left = loss + excess * (variant.total - loss) + variant.noise
                found.append(_candidate(problem, variant, size, left))
    return undominated(found)


def undominated(candidates: list[Candidate]) -> list[Candidate]:
    """Candidates that no other one equals or beats in all of loss, stored bits and read bits, cheapest first.

    Example:
        >>> choice = Choice(AdapterSize(), left_out=0, grid=WeightGrid(4))
        >>> good, bad = (Candidate(choice, loss, stored=400, read=400) for loss in (1.0, 2.0))
        >>> undominated([bad, good]) == [good]
        True
    """
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda item: (item.stored, item.read, item.loss)):
        if all(one.loss < other.loss or one.read < other.read for other in kept):
            kept.append(one)
    return kept


def _variants(
    problem: LinearProblem,
    hessian: Hessian,
    make_branch: Callable[[WeightGrid, int], MainBranch],
    dtypes: Sequence[AdapterDtype],
) -> tuple[list[_Variant], _Variant, ErrorSpectrum]:
    """The scheme's own grid with every number of channels left out, and the other grids with the best one.

    Returns:
        All of them, the best with a correction of the typical rank, and the spectrum of its error.
    """
    out_features, in_features = problem.weight.shape
    largest = min(LARGEST_RANK, min(out_features, in_features) // 2 // RANK_STEP * RANK_STEP)
    tokens, bits = some_tokens(problem.measured()), problem.scheme.activation_bits

    def variant(grid: WeightGrid, count: int) -> tuple[_Variant, ErrorSpectrum]:
        branch = make_branch(grid, count)
        rounding = activation_rounding(tokens, branch, bits)
        noise = float(rounding.square().sum(dtype=torch.float64)) / max(len(tokens), 1)
        spectrum = ErrorSpectrum.of(branch.error, problem.gram(), largest)
        excess = {name: packing_loss(branch.error, hessian, spectrum) if name == "int4" else 0.0 for name in dtypes}
        left = [spectrum.left(rank) for rank in range(spectrum.largest_rank + 1)]
        scaled = branch.inv_omega is not None
        scheme = problem.scheme.with_grid(grid)
        return _Variant(scheme, count, scaled, noise, spectrum.total, left, excess), spectrum

    counts = LEFT_OUT if rounds_activations(bits) else LEFT_OUT[:1]
    best, spectrum = variant(problem.scheme.weight, counts[0])
    found = [best]

    def try_also(grid: WeightGrid, count: int) -> None:
        nonlocal best, spectrum
        other, its_spectrum = variant(grid, count)
        found.append(other)
        if other.typical() < best.typical():
            best, spectrum = other, its_spectrum

    for count in counts[1:]:
        if count <= in_features // 8:
            try_also(problem.scheme.weight, count)
    left_out = best.left_out
    for grid in problem.scheme.budget_grids():
        if grid != problem.scheme.weight:
            try_also(grid, left_out)
    return found, best, spectrum


def _candidate(problem: LinearProblem, variant: _Variant, size: AdapterSize, loss: float) -> Candidate:
    out_features, in_features = problem.weight.shape
    bits = predicted_bits(out_features, in_features, variant.scheme, size, scaled=variant.scaled)
    choice = Choice(size, variant.left_out, variant.scheme.weight)
    return Candidate(choice, loss, bits.stored_bits * bits.weights, bits.read)
