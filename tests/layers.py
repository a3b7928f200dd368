"""Synthetic linear layers with the structure that Quant Experts looks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qe_edge.calibration.sensitivity import IMAGE
from qe_edge.calibration.statistics import StatisticsCollector
from qe_edge.methods import LinearProblem, Method
from qe_edge.numerics.schemes import get_scheme


def typed_layer(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight `[out, in]` and tokens `[n, in]` of four types, each with outlier channels of its own.

    A few channels are large for every token; eight more are large for the tokens of one type only.
    """
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out_features, in_features)) / np.sqrt(in_features)
    x = rng.standard_normal((tokens, in_features)) @ np.diag(np.exp(0.4 * rng.standard_normal(in_features)))
    channels = rng.permutation(in_features)
    x[:, channels[:4]] *= 25
    kind = rng.integers(0, 4, tokens)
    for number in range(4):
        own = channels[4 + 8 * number : 12 + 8 * number]
        x[np.ix_(kind == number, own)] *= 10
    return torch.from_numpy(weight).float(), torch.from_numpy(x).float()


def outlier_layer(
    out_features: int, in_features: int, tokens: int, *, types: int = 8, strength: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, np.ndarray]:
    """A weight `[out, in]`, tokens `[n, in]` and the type `[n]` of every token, less tidy than `typed_layer`.

    Tokens are correlated over channels; some channels are large for nearly all of them, and each type (of Zipf
    distributed sizes) has outlier channels of its own, `strength` large and present in four of five of its tokens.
    """
    rng = np.random.default_rng(seed)
    always, own = max(in_features // 42, 2), max(in_features // 36, 3)
    mixing = rng.standard_normal((96, in_features)) * (0.9 ** np.arange(96))[:, None]
    x = rng.standard_normal((tokens, 96)) @ mixing * 0.5 + 0.6 * rng.standard_normal((tokens, in_features))
    x *= np.exp(0.4 * rng.standard_normal(in_features))
    channels = rng.permutation(in_features)

    def outliers(count: int, rows: int, low: float, high: float, share: float) -> np.ndarray:
        amplitude = rng.uniform(low, high, count) * rng.choice([-1, 1], count)
        present = rng.random((rows, count)) < share
        return present * amplitude * np.exp(0.3 * rng.standard_normal((rows, count)))

    x[:, channels[:always]] += outliers(always, tokens, 12, 40, 0.95)
    size = 1.0 / (1 + np.arange(types)) ** 0.6
    kind = rng.choice(types, tokens, p=size / size.sum())
    for number in range(types):
        rows = np.flatnonzero(kind == number)
        chosen = rng.choice(channels[always:], own, replace=False)
        x[np.ix_(rows, chosen)] += strength * outliers(own, len(rows), 5, 18, 0.8)
    weight = rng.standard_t(6, (out_features, in_features)) / np.sqrt(in_features)
    return torch.from_numpy(weight).float(), torch.from_numpy(x).float(), kind


def correlated_layer(out_features: int, in_features: int, tokens: int) -> tuple[Tensor, Tensor]:
    """A layer whose inputs depend on each other, as those of real models do."""
    weight, x = typed_layer(out_features, in_features, tokens)
    mixing = torch.from_numpy(np.random.default_rng(1).standard_normal((in_features, in_features))).float()
    return weight, x @ (torch.eye(in_features) + 2 * mixing / in_features**0.5)


def two_modalities(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[out, in]`, tokens `[n, in]`, and which are images `[n]`; each modality has eight outlier channels."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out_features, in_features)) / np.sqrt(in_features)
    x = rng.standard_normal((tokens, in_features))
    image = np.arange(tokens) % 2 == 0
    channels = rng.permutation(in_features)
    x[np.ix_(image, channels[:8])] *= 40
    x[np.ix_(~image, channels[8:16])] *= 40
    return torch.from_numpy(weight).float(), torch.from_numpy(x).float(), torch.from_numpy(image)


def problem_of(method: Method[Any], scheme: str, weight: Tensor, x: Tensor, image: Tensor) -> LinearProblem:
    """The problem of a layer on tokens `[n, in]` some of which are images `[n]`, with what the method asks for."""
    request = method.request(*weight.shape)
    statistics = None
    if request:
        collector = StatisticsCollector("layer", weight.shape[1], [weight], request, seed=0)
        collector.update(x, image.to(torch.int8) * IMAGE)
        statistics = collector.finish()[0]
    return LinearProblem("layer", weight, get_scheme(scheme), statistics, seed=0)
