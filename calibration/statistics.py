"""Streamed statistics of a linear layer's input: Gram matrix, token sample, important channels (specification 4).

One pass over the tokens, chunk by chunk; memory is the Gram matrix, a bounded sample of tokens and the top-k lists,
whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qe_edge.errors import NumericalError

MAX_BAD_TOKENS = 0.01  # share of tokens with NaN or infinity above which a layer is refused


@dataclass(frozen=True)
class StatisticsRequest:
    """What a method wants measured on a layer's input.

    Attributes:
        gram: Whether the Gram matrix `X^T X / T` is needed.
        tokens: How many tokens to keep (a uniform sample without replacement); 0 keeps none.
        important: Length k of every token's list of important channels; 0 for none.
    """

    gram: bool = True
    tokens: int = 8192
    important: int = 0


@dataclass(frozen=True)
class InputStatistics:
    """What was measured on the calibration input `X` `[tokens, in]` of one linear problem.

    Attributes:
        count: Number of valid tokens T.
        dropped: Tokens left out because they held NaN or infinity.
        abs_mean: `[in]` float64, mean of |x|.
        abs_max: `[in]` float64, largest |x|.
        gram: `[in, in]` float64 `X^T X / T`, or None.
        tokens: `[sample, in]` float32, a sample in stream order; all tokens when there are few.
        importance: `[T, k]` int32 important channels of every token, or None.
        token_rows: `[sample]` int64, the row of `importance` that belongs to every sampled token.
        token_kind: `[sample]` int8, what every sampled token is: 1 image, 2 reference answer, 0 anything else.
    """

    count: int
    dropped: int
    abs_mean: np.ndarray
    abs_max: np.ndarray
    gram: np.ndarray | None
    tokens: np.ndarray
    importance: np.ndarray | None
    token_rows: np.ndarray
    token_kind: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))


class StatisticsCollector:
    """Accumulates the statistics of one input that one or several problems (siblings) share.

    The Gram matrix and the token sample are kept once; each problem has its own top-k lists, because the importance
    of a channel depends on the weights that read it.

    Args:
        name: Layer name for messages.
        in_features: Width of the input.
        weights: For every problem the weight `[out, in]` that reads this input.
        request: What to measure.
        seed: Seed of the token sample.
    """

    def __init__(
        self, name: str, in_features: int, weights: Sequence[Tensor], request: StatisticsRequest, seed: int
    ) -> None:
        self.name = name
        self.request = request
        self._channel_weight = [weight.detach().float().abs().mean(0).cpu() for weight in weights]
        self._gram = np.zeros((in_features, in_features), np.float64) if request.gram else None
        self._abs_sum = np.zeros(in_features, np.float64)
        self._abs_max = np.zeros(in_features, np.float64)
        self._count = 0
        self._dropped = 0
        self._importance: list[list[np.ndarray]] = [[] for _ in weights]
        # priorities come from one stream, so the sample does not depend on how the tokens are cut into chunks
        self._random = np.random.default_rng(seed)
        self._tokens = np.zeros((0, in_features), np.float32)
        self._priority = np.zeros(0)
        self._rows = np.zeros(0, np.int64)
        self._kinds = np.zeros(0, np.int8)

    def update(self, x: Tensor, kind: Tensor | None = None) -> None:
        """Add a chunk `[..., in]` of valid tokens (padding already removed), and what they are, `[...]` int8."""
        tokens = x.detach().float().cpu().reshape(-1, self._abs_sum.shape[0])
        kinds = torch.zeros(len(tokens), dtype=torch.int8) if kind is None else kind.cpu().reshape(-1)
        finite = torch.isfinite(tokens).all(1)
        if not bool(finite.all()):
            self._dropped += int((~finite).sum())
            tokens, kinds = tokens[finite], kinds[finite]
        if not len(tokens):
            return
        array = tokens.contiguous().numpy()
        if self._gram is not None:
            self._gram += array.T @ array  # numpy recognises X^T X and calls the symmetric BLAS routine
        magnitude = tokens.abs()
        self._abs_sum += magnitude.sum(0, dtype=torch.float64).numpy()
        np.maximum(self._abs_max, magnitude.amax(0).numpy(), out=self._abs_max)
        if self.request.important:
            for lists, weight in zip(self._importance, self._channel_weight, strict=True):
                lists.append(top_channels(magnitude * weight, self.request.important))
        self._sample(array, kinds.numpy())
        self._count += len(array)

    def finish(self) -> list[InputStatistics]:
        """The statistics of every problem.

        Raises:
            NumericalError: If the layer saw no valid token, or more than 1 % of its tokens were not finite.
        """
        seen = self._count + self._dropped
        if self._dropped > MAX_BAD_TOKENS * seen:
            raise NumericalError(
                f"{self._dropped} of {seen} calibration tokens at '{self.name}' hold NaN or infinity.",
                "Check the model in its original precision and the calibration data.",
            )
        if self._count == 0:
            raise NumericalError(
                f"No calibration token reached '{self.name}'.",
                "Use calibration data with pictures and text that exercise every part of the model.",
            )
        self._trim(self.request.tokens)
        order = np.argsort(self._rows, kind="stable")
        gram = None if self._gram is None else self._gram / self._count
        return [
            InputStatistics(
                count=self._count,
                dropped=self._dropped,
                abs_mean=self._abs_sum / self._count,
                abs_max=self._abs_max,
                gram=gram,
                tokens=self._tokens[order],
                importance=np.concatenate(lists) if lists else None,
                token_rows=self._rows[order],
                token_kind=self._kinds[order],
            )
            for lists in self._importance
        ]

    def _sample(self, array: np.ndarray, kinds: np.ndarray) -> None:
        """Keep the tokens with the smallest random priorities: a uniform sample of the stream."""
        if not self.request.tokens:
            return
        priority = self._random.random(len(array))
        rows = np.arange(self._count, self._count + len(array))
        if len(self._priority) >= self.request.tokens:
            keep = priority < self._priority.max()
            array, priority, rows, kinds = array[keep], priority[keep], rows[keep], kinds[keep]
        self._tokens = np.concatenate((self._tokens, array))
        self._priority = np.concatenate((self._priority, priority))
        self._rows = np.concatenate((self._rows, rows))
        self._kinds = np.concatenate((self._kinds, kinds))
        self._trim(self.request.tokens)

    def _trim(self, size: int) -> None:
        if len(self._priority) > size:
            keep = np.sort(np.argpartition(self._priority, size - 1)[:size]) if size else np.zeros(0, np.int64)
            self._tokens, self._priority = self._tokens[keep], self._priority[keep]
            self._rows, self._kinds = self._rows[keep], self._kinds[keep]


def top_channels(score: Tensor, k: int) -> np.ndarray:
    """The `k` channels of highest score of every token, int32 `[tokens, k]`, best first; ties to the lower index.

    Tokens whose score is zero everywhere get the list of -1: they have no important channel.
    """
    order = torch.argsort(score, dim=1, descending=True, stable=True)[:, :k].to(torch.int32)
    order[score.amax(1) <= 0] = -1
    return order.numpy()


def collect_statistics(
    name: str, weight: Tensor, tokens: Tensor, request: StatisticsRequest, seed: int, chunk: int = 4096
) -> InputStatistics:
    """Statistics of one problem whose calibration tokens `[n, in]` are already in memory."""
    collector = StatisticsCollector(name, weight.shape[1], [weight], request, seed)
    for start in range(0, len(tokens), chunk):
        collector.update(tokens[start : start + chunk])
    return collector.finish()[0]
