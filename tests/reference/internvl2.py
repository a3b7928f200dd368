"""InternVL2 as its authors lay it out, in float64 and step by step: fused rows, pixel shuffle, InternLM2 or Qwen2.

After the layout that the InternVL2 checkpoints have; written from its description (Chen et al. 2024, arXiv 2404.16821).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu, softmax

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of both transformers."""

    vision_layers: int
    vision_heads: int
    patch: int
    layers: int
    heads: int
    kv_heads: int
    theta: float
    epsilon: float


def image_features(state: State, sizes: Sizes, pixels: Tensor) -> Tensor:
    """Features `[tiles * tokens, hidden]` of tiles `[tiles, 3, side, side]`."""
    rows = []
    for tile in pixels:
        hidden = _vision(state, sizes, tile)[1:]  # without the class token
        side = math.isqrt(len(hidden))
        grid = hidden.reshape(side, side, -1)
        merged = [
            torch.cat([grid[2 * row, 2 * column], grid[2 * row, 2 * column + 1],
                       grid[2 * row + 1, 2 * column], grid[2 * row + 1, 2 * column + 1]])
            for row in range(side // 2)
            for column in range(side // 2)
        ]  # fmt: skip
        x = torch.stack(merged)
        x = layer_norm(x, x.shape[-1:], state["mlp1.0.weight"], state["mlp1.0.bias"])
        x = gelu(linear(x, state["mlp1.1.weight"], state["mlp1.1.bias"]))
        rows.append(linear(x, state["mlp1.3.weight"], state["mlp1.3.bias"]))
    return torch.cat(rows)


def _vision(state: State, sizes: Sizes, tile: Tensor) -> Tensor:
    prefix = "vision_model.embeddings."
    kernel = state[prefix + "patch_embedding.weight"]
    size = sizes.patch
    patches = [
        (tile[:, row : row + size, column : column + size].flatten() @ kernel.flatten(1).T)
        + state[prefix + "patch_embedding.bias"]
        for row in range(0, tile.shape[1], size)
        for column in range(0, tile.shape[2], size)
    ]
    x = torch.cat([state[prefix + "class_embedding"][0], torch.stack(patches)])
    x = x + state[prefix + "position_embedding"][0]
    for layer in range(sizes.vision_layers):
        name = f"vision_model.encoder.layers.{layer}."
        y = layer_norm(x, x.shape[-1:], state[name + "norm1.weight"], state[name + "norm1.bias"], 1e-6)
        qkv = linear(y, state[name + "attn.qkv.weight"], state[name + "attn.qkv.bias"])
        query, key, value = (_heads(part, sizes.vision_heads) for part in qkv.chunk(3, dim=-1))
        mixed = _attention(query, key, value, causal=False)
        x = x + state[name + "ls1"] * linear(mixed, state[name + "attn.proj.weight"], state[name + "attn.proj.bias"])
        y = layer_norm(x, x.shape[-1:], state[name + "norm2.weight"], state[name + "norm2.bias"], 1e-6)
        y = gelu(linear(y, state[name + "mlp.fc1.weight"], state[name + "mlp.fc1.bias"]))
        x = x + state[name + "ls2"] * linear(y, state[name + "mlp.fc2.weight"], state[name + "mlp.fc2.bias"])
    return x


def logits(state: State, sizes: Sizes, ids: Tensor, image_token: int, features: Tensor) -> Tensor:
    """Logits `[tokens, vocabulary]` of one prompt `[tokens]`, without padding."""
    internlm = "language_model.model.tok_embeddings.weight" in state
    table = state[f"language_model.model.{'tok_embeddings' if internlm else 'embed_tokens'}.weight"]
    x = table[ids].clone()
    x[ids == image_token] = features
    for layer in range(sizes.layers):
        name = f"language_model.model.layers.{layer}."
        attend, after = ("attention_norm", "ffn_norm") if internlm else ("input_layernorm", "post_attention_layernorm")
        y = _rms(x, state[f"{name}{attend}.weight"], sizes.epsilon)
        query, key, value = _internlm_rows(state, sizes, name, y) if internlm else _qwen_rows(state, sizes, name, y)
        query, key = _rotated(query, sizes.theta), _rotated(key, sizes.theta)
        shared = sizes.heads // sizes.kv_heads
        key, value = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0)
        out = state[name + ("attention.wo.weight" if internlm else "self_attn.o_proj.weight")]
        x = x + _attention(query, key, value, causal=True) @ out.T
        y = _rms(x, state[f"{name}{after}.weight"], sizes.epsilon)
        names = ("feed_forward.w1", "feed_forward.w3", "feed_forward.w2")
        names = names if internlm else ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        gate, up, down = (state[f"{name}{part}.weight"] for part in names)
        x = x + (silu(y @ gate.T) * (y @ up.T)) @ down.T
    x = _rms(x, state["language_model.model.norm.weight"], sizes.epsilon)
    return x @ state[f"language_model.{'output' if internlm else 'lm_head'}.weight"].T


def _internlm_rows(state: State, sizes: Sizes, name: str, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values `[heads, tokens, width]` of `wqkv`: by key head its queries, the key, the value."""
    rows = y @ state[name + "attention.wqkv.weight"].T
    shared = sizes.heads // sizes.kv_heads
    width = rows.shape[-1] // (sizes.kv_heads * (shared + 2))
    queries, keys, values = [], [], []
    for head in range(sizes.kv_heads):
        start = head * (shared + 2) * width
        queries += [rows[:, start + query * width : start + (query + 1) * width] for query in range(shared)]
        keys.append(rows[:, start + shared * width : start + (shared + 1) * width])
        values.append(rows[:, start + (shared + 1) * width : start + (shared + 2) * width])
    return torch.stack(queries), torch.stack(keys), torch.stack(values)


def _qwen_rows(state: State, sizes: Sizes, name: str, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        linear(y, state[f"{name}self_attn.{part}_proj.weight"], state[f"{name}self_attn.{part}_proj.bias"])
        for part in "qkv"
    )
    return _heads(query, sizes.heads), _heads(key, sizes.kv_heads), _heads(value, sizes.kv_heads)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.reshape(len(x), heads, -1).transpose(0, 1)


def _attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[1:], -torch.inf, dtype=scores.dtype).triu(1)
    return (softmax(scores, -1) @ value).transpose(0, 1).flatten(1)


def _rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
