"""Split of input channels into token-independent and token-dependent important ones (docs/method.md, section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_COUNT = 5  # tokens for which a channel must be important to take part in clustering


@dataclass(frozen=True)
class ChannelSplit:
    """Important channels of one linear problem.

    Attributes:
        independent: Channels that matter to most tokens (C_s), most frequent first.
        dependent: Channels that matter to some tokens (C_r), most frequent first.
        frequency: `[in]` share of tokens for which each channel is important.
    """

    independent: np.ndarray
    dependent: np.ndarray
    frequency: np.ndarray


def split_channels(importance: np.ndarray, in_features: int, k: int, experts: int) -> ChannelSplit:
    """Sort channels by how often they are important: the first k are token-independent, the next k * experts dependent.

    Args:
        importance: `[T, k]` int32 channel lists, -1 for none.
        in_features: Number of channels.
        k: Channels per token-independent set.
        experts: Number of routed experts.

    Example:
        >>> importance = np.array([[7, 1]] * 6 + [[7, 2]] * 6)  # channel 7 matters to all tokens, 1 and 2 to some
        >>> split = split_channels(importance, in_features=8, k=1, experts=2)
        >>> split.independent.tolist(), split.dependent.tolist(), split.frequency[7].item()
        ([7], [1, 2], 1.0)
    """
    valid = importance[importance >= 0]
    count = np.bincount(valid, minlength=in_features)
    order = np.argsort(-count, kind="stable")
    independent = order[:k]
    independent = independent[count[independent] > 0]
    dependent = order[k : k + k * experts]
    dependent = dependent[count[dependent] >= MIN_COUNT]
    return ChannelSplit(independent, dependent, count / max(len(importance), 1))
