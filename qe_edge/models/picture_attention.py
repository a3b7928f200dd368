"""Attention between the patches of a picture, as exported graphs compute it.

A large picture has so many patches that all scores of a layer do not fit into memory: 7 GB for one of 1920 x 1080.
Attention without a mask becomes one node, `com.microsoft::MultiHeadAttention`, which ONNX Runtime computes in
tiles (FlashAttention, Dao et al. 2022); `qe_edge.export.attention` gives the node a body of standard operators for
other runtimes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softmax

DOMAIN, NAME, VERSION = "com.microsoft", "MultiHeadAttention", 1


def attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Every token attends to every token of its row; while a graph is traced only.

    Args:
        query: `[batch, tokens, heads, head_dim]`, and so are the others.
        key: Keys.
        value: Values.
        scale: Factor on the scores.

    Returns:
        `[batch, tokens, heads * head_dim]`.

    Example:
        >>> import torch
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, tokens: Tensor) -> Tensor:
        ...         return attend_all(tokens, tokens, tokens, scale=0.125)
        >>> traced = torch.onnx.export(Attention().eval(), (torch.zeros(1, 16, 2, 64),), dynamo=True, verbose=False)
        >>> [node.op_type for node in traced.model.graph]
        ['Reshape', 'MultiHeadAttention']
    """
    mixed: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}",
        [part.flatten(2) for part in (query, key, value)],
        attrs={"num_heads": query.shape[2], "scale": scale},
        dtype=query.dtype,
        shape=(*query.shape[:2], query.shape[2] * query.shape[3]),
        version=VERSION,
    )
    return mixed


def attend_masked(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Attention with an additive mask that broadcasts to `[batch, heads, tokens, tokens]`; as `attend_all` else.

    Example:
        >>> import torch
        >>> tokens = torch.randn(1, 16, 2, 64)
        >>> tuple(attend_masked(tokens, tokens, tokens, 0.125, torch.zeros(16, 16)).shape)
        (1, 16, 128)
    """
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(2, 3) * scale + mask
    return (softmax(scores, dim=-1) @ value).transpose(1, 2).flatten(2)
