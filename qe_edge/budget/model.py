"""The types of a budget: its limits, the offers of layers, and the choices that it makes."""

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
        bits: Mean over the checkpoint, and so over the device's memory.
        read_bits: Mean that one decoded token reads: codes, scales, shared expert, one routed expert, router.

    Example:
        >>> budget = Budget(bits=4.5)
        >>> budget.without(0.25), bool(Budget())
        (Budget(bits=4.25, read_bits=None), False)
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    bits: float | None = Field(None, gt=0, le=16)
    read_bits: float | None = Field(None, gt=0, le=16)

    def without(self, bits: float) -> Budget:
        """The budget that is left for the layers if another tensor takes `bits` per weight, stored and read."""
        return Budget(**{name: limit - bits for name, limit in self.model_dump(exclude_none=True).items()})

    def __bool__(self) -> bool:
        """Whether anything is limited."""
        return self.bits is not None or self.read_bits is not None


@dataclass(frozen=True)
class AdapterSize:
    """Sizes of the low-rank correction that a method is going to give a layer. A dry run predicts bits from them.

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
    """The sizes that a budget gives one linear problem.

    Attributes:
        adapters: Its low-rank correction.
        left_out: Important channels that the main branch leaves to the correction.
        grid: Grid of the weight's codes.
    """

    adapters: AdapterSize
    left_out: int
    grid: WeightGrid


@dataclass(frozen=True)
class Candidate:
    """One choice with its costs and its loss.

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
    """The candidates of one linear problem.

    Attributes:
        weights: Number of its weights.
        sensitivity: Factor that makes its losses comparable with other layers'.
        candidates: At least one.
    """

    weights: int
    sensitivity: float
    candidates: Sequence[Candidate]


def check_affordable(budget: Budget, weights: int, stored: float, read: float) -> None:
    """Refuse a budget that is too small even without any correction.

    Args:
        budget: The limits.
        weights: Number of weights of all layers.
        stored: Least bits that they store together.
        read: Least bits that a decoded token reads of them together.

    Raises:
        RecipeError: Naming the least that works.

    Example:
        >>> check_affordable(Budget(bits=4.5), weights=1000, stored=4125, read=4125)
        >>> check_affordable(Budget(bits=4.0), weights=1000, stored=4125, read=4125)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.RecipeError: A budget of 4 bits per weight cannot be met: codes and scales alone
        take 4.125. Ask for more, for example --bits 4.20, or choose a cheaper scheme.
    """
    for limit, total, option in ((budget.bits, stored, "--bits"), (budget.read_bits, read, "--read-bits")):
        least = total / max(weights, 1)
        if limit is not None and limit < least:
            raise RecipeError(
                f"A budget of {limit:g} bits per weight cannot be met: codes and scales alone take {least:.3f}.",
                f"Ask for more, for example {option} {math.ceil(least * 20 + 1) / 20:.2f}, or choose a cheaper scheme.",
            )


def offers_to_json(offers: Mapping[str, Offer]) -> str:
    """Offers as JSON text, for the work folder of a run that may be stopped.

    Example:
        >>> choice = Choice(AdapterSize(rank_shared=8), left_out=0, grid=WeightGrid(4))
        >>> text = offers_to_json({"query": Offer(100, 1.0, [Candidate(choice, loss=2.0, stored=400, read=400)])})
        >>> offers_from_json(text)["query"].candidates[0].choice == choice
        True
    """
    return json.dumps({name: asdict(offer) for name, offer in offers.items()})


def offers_from_json(text: str) -> dict[str, Offer]:
    """Read the text of `offers_to_json`.

    Raises:
        ValueError: If the text is anything else.

    Example:
        >>> offers_from_json('{"query": {"weights": 100, "sensitivity": 1.0, "candidates": []}}')
        {'query': Offer(weights=100, sensitivity=1.0, candidates=[])}
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
