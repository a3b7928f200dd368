"""Distances between two models, summed in float64 over batches of any size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qe_edge.system.errors import NumericalError

REMEDY = "Check the original's weights, then quantize again with another method or scheme."
Names = tuple[str, str]
NAMES: Names = ("the original", "the quantized model")
ROWS = 256  # positions whose full vocabulary is held in float64 at a time


@dataclass
class RelativeError:
    """`||y - y_hat||_F / ||y||_F` over everything that was added.

    Attributes:
        error: Sum of squared differences.
        norm: Sum of squares of the reference.
        rows: Number of tokens.

    Example:
        >>> error = RelativeError()
        >>> error.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]))
        >>> error.value()  # 0.5 / 5
        0.1
    """

    error: float = 0.0
    norm: float = 0.0
    rows: int = 0

    def add(self, reference: Tensor, other: Tensor, names: Names = NAMES) -> None:
        """Add tokens `[n, features]`; messages call the two models by `names`.

        Raises:
            NumericalError: If a sum is not finite: NaN would pass for no error.
        """
        wanted, found = reference.double(), other.double()
        self.error += float((wanted - found).square().sum())
        self.norm += float(wanted.square().sum())
        if not math.isfinite(self.error + self.norm):
            raise _not_finite(reference, other, names)
        self.rows += len(wanted)

    def value(self) -> float | None:
        """Return the error. It is None if nothing was added, or if both sides are zero everywhere.

        Raises:
            NumericalError: If the reference is zero everywhere and the other is not.
        """
        if not self.norm:
            if self.error:
                raise NumericalError("The original's outputs are zero everywhere, the compared ones are not.", REMEDY)
            return None
        return math.sqrt(self.error / self.norm)


@dataclass
class LogitsDistance:
    """Kullback-Leibler divergence and top-1 agreement of predicted distributions.

    Attributes:
        divergence: Sum of KL(reference || other) in nats.
        agreed: Positions whose most likely token is the same.
        positions: Number of positions.

    Example:
        >>> distance = LogitsDistance()
        >>> distance.add(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> distance.positions, distance.agreement(), round(distance.mean_divergence(), 3)
        (2, 0.5, 0.448)
    """

    divergence: float = 0.0
    agreed: int = 0
    positions: int = 0

    def add(self, reference: Tensor, other: Tensor, names: Names = NAMES) -> None:
        """Add logits `[positions, vocabulary]`; messages call the two models by `names`.

        Raises:
            NumericalError: If a logit is not finite: NaN would pass for agreement.
        """
        for wanted, found in zip(torch.split(reference, ROWS), torch.split(other, ROWS), strict=True):
            if not (wanted.isfinite().all() and found.isfinite().all()):
                raise _not_finite(wanted, found, names)
            self.divergence += float(kl_divergence(wanted, found).sum())
            self.agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        self.positions += len(reference)

    def mean_divergence(self) -> float | None:
        """Mean KL in nats per position."""
        return self.divergence / self.positions if self.positions else None

    def agreement(self) -> float | None:
        """Share of positions with the same top-1 token."""
        return self.agreed / self.positions if self.positions else None


def _not_finite(reference: Tensor, other: Tensor, names: Names) -> NumericalError:
    """Return the error for outputs that cannot be compared."""
    for name, tensor in zip(names, (reference, other), strict=True):
        if not tensor.isfinite().all():
            return NumericalError(f"The outputs of {name} hold NaN or infinity.", REMEDY)
    return NumericalError(f"The outputs of {names[0]} and {names[1]} are too large to be compared.", REMEDY)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) in nats, float64 `[positions]`, of logits `[positions, vocabulary]`.

    Example:
        >>> half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
        >>> kl_divergence(half, half).tolist(), kl_divergence(half, quarter)  # 0.5 log 2 + 0.5 log (2 / 3)
        ([0.0], tensor([0.1438], dtype=torch.float64))
    """
    wanted, found = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    probability = wanted.exp()
    # a token that the reference excludes (-inf) contributes nothing, whatever the other says
    terms = torch.where(probability > 0, probability * (wanted - found), 0.0)
    return terms.sum(-1)
