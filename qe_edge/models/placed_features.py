"""Puts the features of pictures and videos into a prompt's embeddings, where a model's own code cannot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def embeds_with(model: Any, input_ids: Tensor, features: Mapping[int, Tensor]) -> Tensor:  # noqa: ANN401 - transformers'
    """Embeddings `[batch, sequence, width]` of tokens, with features in the places of some.

    Args:
        model: A model of transformers.
        input_ids: `[batch, sequence]`.
        features: By token `[places, width]`, in order.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(8, 2))
        >>> embeds_with(model, torch.tensor([[5, 7]]), {7: torch.tensor([[1.0, 2.0]])})[0, 1].tolist()
        [1.0, 2.0]
    """
    embeds: Tensor = model.get_input_embeddings()(input_ids)
    for token, values in features.items():
        embeds = embeds.masked_scatter((input_ids == token)[..., None], values.to(embeds))
    return embeds
