"""Spends a number of bits per weight on a model's layers: a multiple-choice knapsack on the calibration loss.

Every layer offers candidates. A candidate has a loss, the bits that it stores and the bits that a decoded token reads.
One candidate of each layer is taken: the sum of losses is least, and the means of stored and read bits stay inside the
budget. The mean square gradient of the loss at a layer's outputs makes layers comparable: to second order it is the
loss that an error there costs. scipy's HiGHS solves the problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from qe_edge.budget.model import Budget, Choice, Offer, check_affordable
from qe_edge.layers.linear import QuantizedLinear
from qe_edge.system.c_output import silent_c_stdout
from qe_edge.system.errors import RecipeError

GAP = 1e-3  # relative distance to the proven optimum at which the solver may stop
LARGEST_STEP = 4  # binary digits by which an output is scaled at most
SECONDS = 120.0  # after which it stops with the best allocation found


def allocate(offers: Mapping[str, Offer], budget: Budget) -> dict[str, Choice]:
    """One choice for every problem, at the least sum of losses inside the budget.

    Raises:
        RecipeError: If even the cheapest candidates together exceed it.

    Example:
        >>> from qe_edge.budget.model import AdapterSize, Candidate
        >>> from qe_edge.numerics.grids import WeightGrid
        >>> small, large = (Choice(AdapterSize(), left_out=0, grid=WeightGrid(bits)) for bits in (3, 4))
        >>> candidates = [Candidate(small, 4.0, stored=300, read=300), Candidate(large, 1.0, stored=400, read=400)]
        >>> offers = {"query": Offer(100, 1.0, candidates), "down": Offer(100, 5.0, candidates)}
        >>> chosen = allocate(offers, Budget(bits=3.5))
        >>> {name: choice.grid.bits for name, choice in chosen.items()}
        {'query': 3, 'down': 4}
    """
    weights = sum(offer.weights for offer in offers.values())
    stored, read = (
        sum(min(getattr(one, cost) for one in offer.candidates) for offer in offers.values())
        for cost in ("stored", "read")
    )
    check_affordable(budget, weights, stored, read)
    pairs = [(row, candidate) for row, offer in enumerate(offers.values()) for candidate in offer.candidates]
    losses = np.array(
        [offer.sensitivity * candidate.loss for offer in offers.values() for candidate in offer.candidates]
    )
    rows = np.array([row for row, _ in pairs])
    one_each = csr_array((np.ones(len(pairs)), (rows, np.arange(len(pairs)))), shape=(len(offers), len(pairs)))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit, cost in ((budget.bits, "stored"), (budget.read_bits, "read")):
        if limit is not None:
            costs = np.array([getattr(candidate, cost) for _, candidate in pairs])
            constraints.append(LinearConstraint(costs[None] / (limit * weights), -np.inf, 1))
    # where HiGHS repairs a solution it prints the name of a function of its own, whatever its options say
    with silent_c_stdout():
        found = milp(
            losses / max(losses.max(), 1e-300),
            integrality=np.ones(len(pairs)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
    if found.x is None:
        raise RecipeError(f"The budget could not be allocated: {found.message}", "Ask for a few more bits.")
    taken = [candidate for share, (_, candidate) in zip(found.x, pairs, strict=True) if share > 0.5]
    return {name: candidate.choice for name, candidate in zip(offers, taken, strict=True)}


def output_factors(channels: np.ndarray) -> np.ndarray:
    """Powers of two `[out]` that scale a layer's outputs so that an error costs about the same in each.

    A layer is quantized with its rows scaled, and scaled back afterwards, which for powers of two is exact.

    Args:
        channels: `[out]` mean square gradient of the loss at the outputs.

    Example:
        >>> output_factors(np.array([1.0, 1.0, 16.0])).tolist()
        [0.5, 0.5, 2.0]
    """
    mean = max(float(channels.mean()), 1e-300)
    ratio = np.clip(channels / mean, 2.0 ** (-2 * LARGEST_STEP), 2.0 ** (2 * LARGEST_STEP))
    factors: np.ndarray = np.exp2(np.round(np.log2(ratio) / 2))
    return factors


def scaled_back(linear: QuantizedLinear, factors: Tensor) -> QuantizedLinear:
    """Undo the scaling of rows by `factors` `[out]` with which a layer was quantized.

    Example:
        >>> import torch
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> weight, factors = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([1.0, 4.0])
        >>> quantized = QuantizedLinear(quantize_weight(weight * factors[:, None], WeightGrid(4)), activation_bits=8)
        >>> scaled_back(quantized, factors).weight.decode().round(decimals=2)
        tensor([[ 1., -1.],
                [ 1.,  1.]])
    """
    weight = replace(linear.weight, scales=_divided(linear.weight.scales, factors))
    adapters = linear.adapters
    if adapters is not None and adapters.up_scale is not None:
        adapters = replace(adapters, up_scale=_divided(adapters.up_scale, factors))
    elif adapters is not None:
        adapters = replace(adapters, up=_divided(adapters.up, factors))
    return replace(linear, weight=weight, adapters=adapters)


def _divided(rows: Tensor, factors: Tensor) -> Tensor:
    shape = (-1, *[1] * (rows.ndim - 1))
    return (rows.float() / factors.reshape(shape)).to(rows.dtype)
