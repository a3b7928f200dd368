"""Streamed statistics of a layer's input: Gram matrix, token sample, important channels (docs/method.md, section 4).

There is one pass over the tokens, chunk by chunk. Memory holds the Gram matrix and a bounded sample of the tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor

from qe_edge.layers.magnitudes import check_tokens
from qe_edge.numerics.int8_products import add_gram, round_channels, rounds_gram
from qe_edge.numerics.matrices import Matrix, picked, to_tensor
from qe_edge.system.device import CPU
from qe_edge.system.errors import NumericalError, QENotice

MAX_BAD_TOKENS = 0.01  # share of tokens with NaN or infinity above which a layer is refused
TOP_TOKENS = 1024  # tokens whose top-k lists are made at a time
CACHED = 1 << 18  # numbers of tokens that are worked on at a time
CHUNK = 4096  # tokens that are added up at a time
DOUBLE_WIDTH = 4096  # inputs up to which the Gram matrix is added up in float64; wider ones take half the memory


@dataclass(frozen=True)
class StatisticsRequest:
    """The statistics that a method needs of a layer's input.

    Attributes:
        gram: Whether the Gram matrix `X^T X / T` is needed.
        tokens: How many tokens to keep (a uniform sample without replacement); 0 keeps none.
        important: Length k of every kept token's list of important channels; 0 for none.
    """

    gram: bool = True
    tokens: int = 8192
    important: int = 0


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the calibration input `X` `[tokens, in]` of one linear problem.

    Attributes:
        count: Number of valid tokens T.
        dropped: Tokens left out because they held NaN or infinity.
        abs_mean: `[in]` float64, mean of |x|.
        abs_max: `[in]` float64, largest |x|.
        gram: `[in, in]` `X^T X / T`, float64 up to `DOUBLE_WIDTH` inputs and float32 beyond, or None; on the device
            that quantizes the layer.
        tokens: `[sample, in]` float32, a sample in stream order, all tokens when there are few; on the same device.
        importance: `[sample, k]` int32 important channels of every sampled token, or None.
        token_kind: `[sample]` int8, the kind of every sampled token: 1 image, 2 reference answer, 0 anything else.
    """

    count: int
    dropped: int
    abs_mean: np.ndarray
    abs_max: np.ndarray
    gram: Matrix | None
    tokens: Matrix
    importance: np.ndarray | None
    token_kind: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int8))


class StatisticsCollector:
    """Accumulates the statistics of one input that one or several problems (siblings) share.

    The Gram matrix and the token sample are kept once; each problem has its own top-k lists, because the importance
    of a channel depends on the weights that read it.

    Args:
        name: Layer name for messages.
        in_features: Width of the input.
        weights: For every problem the weight `[out, in]` that reads this input.
        request: The statistics to measure.
        seed: Seed of the token sample.
        device: Device that quantizes the layer and keeps the Gram matrix and the sample.
        token_weights: `[tokens]` factor of every token's share of the Gram matrix, in stream order; None for 1.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> query, key = torch.randn(32, 16), torch.randn(8, 16)  # siblings, which read the same input
        >>> request = StatisticsRequest(tokens=100, important=4)
        >>> collector = StatisticsCollector("attention", 16, [query, key], request, seed=0)
        >>> for _ in range(3):  # batches of tokens
        ...     collector.update(torch.randn(2, 50, 16))
        >>> own, other = collector.finish()
        >>> own.count, own.gram.shape, own.tokens.shape, other.importance.shape
        (300, (16, 16), (100, 16), (100, 4))
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        weights: Sequence[Tensor],
        request: StatisticsRequest,
        seed: int,
        device: torch.device = CPU,
        token_weights: np.ndarray | None = None,
    ) -> None:
        self.name = name
        self.request = request
        self._channel_weight = [weight.detach().float().abs().mean(0).cpu() for weight in weights]
        self._device = device
        self._gram = GramMatrix(in_features, device) if request.gram else None
        self._token_roots = None if token_weights is None else torch.from_numpy(token_weights).float().sqrt()
        self._abs_sum = np.zeros(in_features, np.float64)
        self._abs_max = np.zeros(in_features, np.float64)
        self._count = 0
        self.dropped = 0  # tokens that held NaN or infinity
        # priorities come from one stream, so the sample does not depend on how the tokens are cut into chunks
        self._random = np.random.default_rng(seed)
        size = request.tokens
        # memory of the CPU that is never written is never taken
        self._tokens: Matrix = (
            np.empty((size, in_features), np.float32)
            if device == CPU
            else torch.empty(size, in_features, device=device)
        )
        self._priority, self._rows, self._kinds = np.empty(size), np.empty(size, np.int64), np.empty(size, np.int8)
        self._filled = 0

    def update(self, x: Tensor, kind: Tensor | None = None) -> None:
        """Add a chunk `[..., in]` of valid tokens (padding already removed), and their kinds `[...]` int8.

        Raises:
            NumericalError: If they are too large for sums of their squares.
        """
        tokens = x.detach().float().reshape(-1, self._abs_sum.shape[0])
        kinds = torch.zeros(len(tokens), dtype=torch.int8) if kind is None else kind.cpu().reshape(-1)
        for start in range(0, len(tokens), CHUNK):
            self._add(tokens[start : start + CHUNK], kinds[start : start + CHUNK])

    def _add(self, tokens: Tensor, kinds: Tensor) -> None:
        first = self._count + self.dropped
        roots = None if self._token_roots is None else self._token_roots[first : first + len(tokens)]
        if roots is not None and len(roots) != len(tokens):
            raise ValueError(f"'{self.name}' sees more tokens than there are weights of tokens")
        total, largest = magnitudes(tokens)
        if not bool(torch.isfinite(total).all()):  # NaN and infinity stay what they are in a sum
            finite = torch.isfinite(tokens).all(1)
            self.dropped += int((~finite).sum())
            tokens, kinds = tokens[finite], kinds[finite.cpu()]
            roots = None if roots is None else roots[finite.cpu()]
            if not len(tokens):
                return
            total, largest = magnitudes(tokens)
        check_tokens(self.name, float(largest.max()))
        tokens = tokens.contiguous()
        if self._gram is not None and roots is None:
            self._gram.add(tokens, largest)
        elif self._gram is not None and roots is not None:
            weighed = tokens * roots.to(tokens.device).unsqueeze(1)
            self._gram.add(weighed, magnitudes(weighed)[1])
        self._abs_sum += total.cpu().numpy()
        np.maximum(self._abs_max, largest.cpu().numpy(), out=self._abs_max)
        self._sample(tokens, kinds.numpy())
        self._count += len(tokens)

    def finish(self) -> list[InputStatistics]:
        """The statistics of every problem; ends the collection. Tokens that were left out are a notice.

        Raises:
            NumericalError: If the layer saw no valid token, or more than 1 % of its tokens were not finite.
        """
        seen = self._count + self.dropped
        if self.dropped > MAX_BAD_TOKENS * seen:
            raise NumericalError(
                f"{self.dropped} of {seen} calibration tokens at '{self.name}' hold NaN or infinity.",
                "Check the model in its original precision and the calibration data.",
            )
        if self._count == 0:
            raise NumericalError(
                f"No calibration token reached '{self.name}'.",
                "Use calibration data for every part of the model, or a method without calibration (rtn, lorc).",
            )
        if self.dropped:
            warnings.warn(
                QENotice(f"{self.dropped} of {seen} tokens at '{self.name}' were left out: NaN or infinity."),
                stacklevel=2,
            )
        order = np.argsort(self._rows[: self._filled], kind="stable")
        gram = None if self._gram is None else self._gram.mean(self._count)
        tokens, kinds = picked(self._tokens, order), self._kinds[order]
        del self._tokens
        return [
            InputStatistics(
                count=self._count,
                dropped=self.dropped,
                abs_mean=self._abs_sum / self._count,
                abs_max=self._abs_max,
                gram=gram,
                tokens=tokens,
                importance=self._important(tokens, weight),
                token_kind=kinds,
            )
            for weight in self._channel_weight
        ]

    def _important(self, tokens: Matrix, weight: Tensor) -> np.ndarray | None:
        """Top-k lists of the sampled tokens for one problem."""
        if not self.request.important:
            return None
        starts = range(0, max(len(tokens), 1), TOP_TOKENS)
        parts = [to_tensor(tokens[start : start + TOP_TOKENS]) for start in starts]
        weight = weight.to(parts[0].device)
        return np.concatenate([top_channels(part.abs() * weight, self.request.important) for part in parts])

    def _sample(self, tokens: Tensor, kinds: np.ndarray) -> None:
        """Keep the tokens with the smallest random priorities: a uniform sample of the stream."""
        size = self.request.tokens
        if not size:
            return
        priority = self._random.random(len(tokens))
        rows = np.arange(self._count, self._count + len(tokens))
        room = min(size - self._filled, len(tokens))
        free, new = np.arange(self._filled, self._filled + room), np.arange(room)
        self._filled += room
        self._keep(free, new, tokens, priority, rows, kinds)
        if room == len(tokens):
            return
        # a new token among the `size` smallest takes the place of one that no longer is
        kept = np.argpartition(np.concatenate((self._priority, priority[room:])), size - 1)[:size]
        free = np.setdiff1d(np.arange(size), kept, assume_unique=True)
        self._keep(free, kept[kept >= size] - size + room, tokens, priority, rows, kinds)

    def _keep(
        self,
        free: np.ndarray,
        new: np.ndarray,
        tokens: Tensor,
        priority: np.ndarray,
        rows: np.ndarray,
        kinds: np.ndarray,
    ) -> None:
        """Put the tokens `new` of a chunk at the places `free` of the sample."""
        self._priority[free], self._rows[free], self._kinds[free] = priority[new], rows[new], kinds[new]
        if isinstance(self._tokens, Tensor):
            self._tokens[torch.from_numpy(free).to(self._device)] = picked(tokens.to(self._device), new)
            return
        rows_of = tokens if tokens.device == CPU else tokens[torch.from_numpy(new).to(tokens.device)].cpu()
        values, sources = rows_of.numpy(), new if tokens.device == CPU else range(len(new))
        for place, source in zip(free, sources, strict=True):  # indexing would copy them twice
            self._tokens[place] = values[source]


class GramMatrix:
    """The sum of `x^T x` over chunks, one triangle of it, with the fastest product that is precise enough.

    Wide inputs are rounded to INT8 where the processor multiplies that faster (see `int8_products`).

    Args:
        in_features: Width of the tokens.
        device: Device of the result.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> total = GramMatrix(2)
        >>> total.add(x, x.abs().amax(0))
        >>> total.mean(count=2)
        array([[ 5.,  7.],
               [ 7., 10.]])
    """

    def __init__(self, in_features: int, device: torch.device = CPU) -> None:
        double = in_features <= DOUBLE_WIDTH
        self._device = device
        self._sum = np.zeros((in_features, in_features), np.float64 if double else np.float32, order="F")
        self._elsewhere: Tensor | None = None
        self._rounded = rounds_gram(in_features)

    def add(self, tokens: Tensor, largest: Tensor) -> None:
        """Add a chunk `[n, in]` float32, at most `CHUNK` tokens, given max |x| `[in]`; one on a GPU is added there."""
        if tokens.device != CPU or self._device != CPU:
            self.add_there(tokens.to(self._device) if self._device != CPU else tokens)
        elif self._rounded:
            add_gram(torch.from_numpy(self._sum.T), *round_channels(tokens.numpy(), largest.numpy()))
        elif self._sum.dtype == np.float32:
            self._sum = ssyrk(1.0, tokens.numpy().T, beta=1.0, c=self._sum, lower=1, overwrite_c=1)
        else:
            self._sum += ssyrk(1.0, tokens.numpy().T, lower=1)

    def add_there(self, tokens: Tensor) -> None:
        """Add a chunk with torch, on the chunk's device."""
        if self._elsewhere is None:
            dtype = torch.float64 if self._sum.dtype == np.float64 else torch.float32
            self._elsewhere = torch.zeros(self._sum.shape, dtype=dtype, device=tokens.device)
        self._elsewhere += tokens.T @ tokens

    def mean(self, count: int) -> Matrix:
        """The whole symmetric matrix over `count` tokens `[in, in]`; ends the sum, which is not there twice."""
        if self._elsewhere is not None and self._device != CPU:
            return self._elsewhere.div_(count)
        if self._elsewhere is not None:
            self._sum += self._elsewhere.cpu().numpy()
        gram: np.ndarray = mirror_triangle(self._sum).T  # symmetric; this view is C-contiguous
        del self._sum, self._elsewhere
        gram /= count
        return gram


def magnitudes(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and maximum of |x| over tokens `[n, in]`, each `[in]`, in pieces that stay in a core's cache.

    Example:
        >>> magnitudes(torch.tensor([[1.0, -2.0], [-3.0, 0.5]]))
        (tensor([4.0000, 2.5000]), tensor([3., 2.]))
    """
    if tokens.device != CPU:
        magnitude = tokens.abs()
        return magnitude.sum(0), magnitude.amax(0)
    # numpy reuses the memory of a piece; to take new memory for each costs more than the sums
    total, largest = np.zeros((2, tokens.shape[1]), np.float32)
    size = max(1, CACHED // tokens.shape[1])
    for start in range(0, len(tokens), size):
        piece = np.abs(tokens[start : start + size].numpy())
        total += piece.sum(0)
        np.maximum(largest, piece.max(0), out=largest)
    return torch.from_numpy(total), torch.from_numpy(largest)


def mirror_triangle(matrix: np.ndarray, tile: int = 512) -> np.ndarray:
    """Copy the lower triangle of a square matrix over the upper one, in place, tile by tile; returns it.

    Example:
        >>> mirror_triangle(np.array([[1.0, 0.0], [2.0, 3.0]]))
        array([[1., 2.],
               [2., 3.]])
    """
    size = len(matrix)
    for row in range(0, size, tile):
        rows = slice(row, row + tile)
        diagonal = np.tril(matrix[rows, rows])
        matrix[rows, rows] = diagonal + np.tril(diagonal, -1).T
        for column in range(0, row, tile):
            columns = slice(column, column + tile)
            matrix[columns, rows] = matrix[rows, columns].T
    return matrix


def top_channels(score: Tensor, k: int) -> np.ndarray:
    """The `k` channels of highest score of every token, int32 `[tokens, k]`, best first; ties to the lower index.

    Tokens whose score is zero everywhere get the list of -1: they have no important channel.

    Example:
        >>> top_channels(torch.tensor([[0.1, 5.0, 3.0], [0.0, 0.0, 0.0]]), k=2)
        array([[ 1,  2],
               [-1, -1]], dtype=int32)
    """
    k = min(k, score.shape[1])
    # topk takes any of the channels that tie for the last places: one more tells where they do
    values, order = torch.topk(score, min(k + 1, score.shape[1]), dim=1)
    tied = (values[:, k - 1] == values[:, k]).nonzero()[:, 0] if values.shape[1] > k else order.new_zeros(0)
    values, order = values[:, :k], order[:, :k]
    order, ascending = order.sort(dim=1)
    values, by_value = values.gather(1, ascending).sort(dim=1, descending=True, stable=True)
    order = order.gather(1, by_value).to(torch.int32)
    if len(tied):
        order[tied] = torch.argsort(score[tied], dim=1, descending=True, stable=True)[:, :k].to(torch.int32)
    order[values[:, 0] <= 0] = -1
    return order.cpu().numpy()


def collect_statistics(
    name: str, weight: Tensor, tokens: Tensor, request: StatisticsRequest, seed: int, chunk: int = 4096
) -> InputStatistics:
    """Statistics of one problem whose calibration tokens `[n, in]` are already in memory.

    Example:
        >>> tokens = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> found = collect_statistics("mlp", torch.ones(3, 2), tokens, StatisticsRequest(important=1), seed=0)
        >>> found.gram.tolist(), found.abs_max.tolist(), found.importance.tolist()
        ([[1.0, 1.0], [1.0, 2.0]], [1.0, 2.0], [[0], [1]])
    """
    collector = StatisticsCollector(name, weight.shape[1], [weight], request, seed)
    for start in range(0, len(tokens), chunk):
        collector.update(tokens[start : start + chunk])
    return collector.finish()[0]
