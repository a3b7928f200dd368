"""Layers of the gated delta rule, as exported graphs compute them.

One node a layer, `com.microsoft::LinearAttention`, takes a matrix for each head from token to token (Yang et al. 2024,
"Gated Delta Networks"): `S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T` and
`o_t = S_t^T q_t / sqrt(key width)`. `qe_edge.export.linear_attention` gives the node a body of standard operators for
other runtimes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.models.cached_states import NewTokens

DOMAIN, NAME, VERSION = "com.microsoft", "LinearAttention", 1
RULE = "torch_chunk_gated_delta_rule"  # the function of transformers that the node stands for
EPSILON = 1e-6  # of transformers' norm of queries and keys


@contextmanager
def remembering(model: nn.Module, tokens: NewTokens) -> Iterator[None]:
    """Let the layers of a text model of transformers be such nodes; undone afterwards.

    Example:
        >>> model, past = nn.Identity(), {"0.recurrent": torch.zeros(1, 2, 8, 8)}
        >>> with remembering(model, NewTokens(past, torch.ones(1, 3), sequence=3)):
        ...     model(1)  # a model without such layers is as it was
        1
    """
    layers = [layer for layer in model.modules() if type(layer).__name__.endswith("GatedDeltaNet")]
    with ExitStack() as stack:
        for module in {sys.modules[type(layer).__module__] for layer in layers}:
            stack.callback(setattr, module, RULE, getattr(module, RULE))
            setattr(module, RULE, _rule(tokens))
        yield


def _rule(tokens: NewTokens) -> Any:  # noqa: ANN401 - a function of transformers' signature
    def rule(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_keywords: object
    ) -> tuple[Tensor, Tensor]:
        """As transformers calls it: `[batch, sequence, heads, width]`, `g` and `beta` `[batch, sequence, heads]`."""
        past, heads = tokens.recurrent, value.shape[2]
        shared = heads // key.shape[2]
        query, key = (_normed(part).repeat_interleave(shared, dim=2) for part in (query, key))
        real = tokens.real.to(g.dtype)[..., None]  # padding changes nothing: it decays by 1, and adds 0
        mixed, present = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            [query.flatten(2), key.flatten(2), value.flatten(2), past, g * real, beta * real],
            attrs={
                "q_num_heads": heads,
                "kv_num_heads": heads,
                "update_rule": "gated_delta",
                "scale": query.shape[3] ** -0.5,
            },
            dtypes=[value.dtype] * 2,
            shapes=[(*value.shape[:2], heads * value.shape[3]), past.shape],
            version=VERSION,
        )
        return mixed.reshape(value.shape), present

    return rule


def _normed(part: Tensor) -> Tensor:
    return part * torch.rsqrt((part * part).sum(-1, keepdim=True) + EPSILON)
