"""Synthetic linear layers with the structure that Quant Experts looks for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
