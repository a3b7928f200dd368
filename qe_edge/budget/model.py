"""The words of a budget: its limits, what layers offer it, and what it gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qe_edge.numerics.grids import WeightGrid
from qe_edge.system.errors import RecipeError


class Budget(BaseModel):
    """Effective bits per quantized weight, with everything that belongs to a layer; None is no limit.

    Attributes:
        bits: Mean over the checkpoint: what the device's memory holds.
        read_bits: Mean that one decoded token reads: codes, scales, shared expert, one routed expert, router.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: float | None = Field(None, gt=0, le=16)
    read_bits: float | None = Field(None, gt=0, le=16)

    def without(self, bits: float) -> Budget:
        """What is left for the layers where something beside them takes `bits` per weight, which is stored and read."""
        return Budget(**{name: limit - bits for name, limit in self.model_dump(exclude_none=True).items()})

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self.bits is not None or self.read_bits is not None


@dataclass(frozen=True)
class AdapterSize:
    """The low-rank correction that a method is going to give a layer; what a dry run predicts sizes from.

    Attributes:
        rank_shared: Rank of the shared expert.
        rank_routed: Rank of every routed expert.
        experts: Number of routed experts.
        factor_bits: Bits of one stored number of the factors.
    """

    rank_shared: int = 0
    rank_routed: int = 0
    experts: int = 0
    factor_bits: int = 16


@dataclass(frozen=True)
class Choice:
    """What a budget gives one linear problem.

    Attributes:
        adapters: Its low-rank correction.
        left_out: Important channels that the main branch leaves to it.
        grid: Of the weight's codes.
    """

    adapters: AdapterSize
    left_out: int
    grid: WeightGrid


@dataclass(frozen=True)
class Candidate:
    """One choice with what it costs and what it leaves.

    Attributes:
        choice: The choice.
        loss: Mean square error of the layer's output, summed over its channels, per calibration token.
        stored: Bits of the whole layer in a checkpoint.
        read: Bits that one decoded token reads.
    """

    choice: Choice
    loss: float
    stored: float
    read: float


@dataclass(frozen=True)
class Offer:
    """What one linear problem offers.

    Attributes:
        weights: Number of its weights.
        sensitivity: Factor that makes its losses comparable with other layers'.
        candidates: At least one.
    """

    weights: int
    sensitivity: float
    candidates: Sequence[Candidate]


def check_affordable(budget: Budget, weights: int, stored: float, read: float) -> None:
    """Refuse a budget below what the layers need without any correction.

    Args:
        budget: What is asked for.
        weights: Number of weights of all layers.
        stored: Least bits that they store together.
        read: Least bits that a decoded token reads of them together.

    Raises:
        RecipeError: Naming the least that works.
    """
    for limit, total, option in ((budget.bits, stored, "--bits"), (budget.read_bits, read, "--read-bits")):
        least = total / max(weights, 1)
        if limit is not None and limit < least:
            raise RecipeError(
                f"A budget of {limit:g} bits per weight cannot be met: codes and scales alone take {least:.3f}.",
                f"Ask for more, for example {option} {math.ceil(least * 20 + 1) / 20:.2f}, or choose a cheaper scheme.",
            )


def offers_to_json(offers: Mapping[str, Offer]) -> str:
    """Offers as text, for the folder of a run that may be stopped."""
    return json.dumps({name: asdict(offer) for name, offer in offers.items()})


def offers_from_json(text: str) -> dict[str, Offer]:
    """What `offers_to_json` wrote.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        return {
            name: Offer(offer["weights"], offer["sensitivity"], [_candidate(one) for one in offer["candidates"]])
            for name, offer in json.loads(text).items()
        }
    except (KeyError, TypeError, AttributeError, RecipeError) as error:
        raise ValueError("no offers") from error


def _candidate(values: dict[str, Any]) -> Candidate:
    choice = dict(values["choice"])
    adapters, grid = AdapterSize(**choice.pop("adapters")), WeightGrid(**choice.pop("grid"))
    return Candidate(Choice(adapters, grid=grid, **choice), values["loss"], values["stored"], values["read"])
