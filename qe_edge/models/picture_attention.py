"""Attention between the patches of a picture, as exported graphs compute it.

A large picture has so many patches that all scores of a layer do not fit into memory: 7 GB for one of 1920 x 1080.
Attention without a mask becomes one node, `com.microsoft::MultiHeadAttention`, which ONNX Runtime computes in
tiles (FlashAttention, Dao et al. 2022); `qe_edge.export.attention` gives the node a body of standard operators for
other runtimes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad, softmax

DOMAIN, NAME, VERSION = "com.microsoft", "MultiHeadAttention", 1
MULTIPLE = 8  # of numbers in a head
NOTHING = -3e4  # which float16 holds; times a scale it leaves no weight to a key


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


def attend_counted(query: Tensor, key: Tensor, value: Tensor, scale: float, counted: Tensor) -> Tensor:
    """`attend_all`, where some keys do not count.

    Scores get no mask, which would need memory for all of them: heads get one more number, 1 in every query, and so
    small in a key that does not count that its weight is 0.

    Args:
        query: As for `attend_all`.
        key: As for `attend_all`.
        value: As for `attend_all`.
        scale: As for `attend_all`.
        counted: `[batch, tokens]`, 1 on keys that count and 0 on others; each row has some that do.

    Example:
        >>> import torch
        >>> class Attention(torch.nn.Module):
        ...     def forward(self, tokens: Tensor, counted: Tensor) -> Tensor:
        ...         return attend_counted(tokens, tokens, tokens, 0.125, counted)
        >>> inputs = (torch.zeros(1, 16, 2, 64), torch.ones(1, 16))
        >>> traced = torch.onnx.export(Attention().eval(), inputs, dynamo=True, verbose=False)
        >>> [str(node.inputs[0].shape) for node in traced.model.graph if node.op_type == "MultiHeadAttention"]
        ['[1,16,144]']
    """
    batch, tokens, heads, width = query.shape
    more = MULTIPLE - width % MULTIPLE  # kernels want multiples
    query, key, value = (pad(part, (0, more)) for part in (query, key, value))
    added = one_hot(torch.tensor(width), width + more).to(query.dtype)
    key = key + ((1 - counted) * NOTHING)[..., None, None] * added
    mixed = attend_all(query + added, key, value, scale).reshape(batch, tokens, heads, width + more)
    return mixed[..., :width].flatten(2)


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
