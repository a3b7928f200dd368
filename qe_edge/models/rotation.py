"""Orthogonal changes of basis of a language model that leave what it computes as it is (QuaRot, SpinQuant).

`h' = h R` for the residual stream: the embedding and everything that writes into the stream is rotated, everything that
reads it is rotated back. An RMSNorm commutes with that once its gains are folded into the layers that follow it. Per
head, the values are rotated and the output projection back.

A head that shares the embedding goes on sharing it: the gains `g` of the last norm cannot be folded into it then, and
become a small matrix between the two, `norm(h) diag(g) E^T = norm(h R) (R^T diag(g) R) (E R)^T`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.errors import ModelError
from qe_edge.models.loading import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 8192  # rows or columns that are in float64 at once
PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
READERS = {
    "input_layernorm": ("self_attn", "q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("mlp", "gate_proj", "up_proj"),
}
WRITERS = (("self_attn", "o_proj"), ("mlp", "down_proj"))


class MixedNorm(nn.Module):
    """A norm, and the matrix that its gains become in front of a head that shares the rotated embedding.

    Args:
        norm: The norm.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.get_parameter("weight")
        size, like = weight.numel(), {"dtype": weight.dtype, "device": weight.device}
        self.norm = norm
        self.mixing = nn.Linear(size, size, bias=False, **like)  # type: ignore[arg-type] # dtype and device

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm and matrix of `[..., hidden]`."""
        mixed: Tensor = self.mixing(self.norm(hidden))
        return mixed


def rotate_language_model(loaded: LoadedModel, seed: int) -> None:
    """Rotate a decoder in place, in float64; every tensor keeps its dtype.

    Raises:
        ModelError: If the decoder is built otherwise than RMSNorm, attention, RMSNorm, gated MLP, as Llama's and
            Qwen2's are.
    """
    blocks = [block for block in loaded.family.blocks(loaded.model) if block.group == "language"]
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    if not blocks or not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise _unknown("it has no language model with a head")
    norm = last_norm(loaded.model)
    for block in blocks:
        _check_block(block.name, block.module)
    _check_norm("the last norm", norm)
    config = loaded.model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads

    tied = head.weight is embedding.weight
    rotation = random_rotation(embedding.embedding_dim, np.random.default_rng(seed))
    in_head = hadamard_like(width)
    _read(embedding, None, rotation)
    for linear in _merger_ends(loaded):
        _write(linear, rotation)
    for block in blocks:
        for name, (parent, *names) in READERS.items():
            gains = _take_gains(block.module.get_submodule(name))
            for other in names:
                _read(_linear(block.module, parent, other), gains, rotation)
        _rotate_heads(block.module, in_head)
        for parent, name in WRITERS:
            _write(_linear(block.module, parent, name), rotation)
    gains = _take_gains(norm)
    if not tied:
        _read(head, gains, rotation)
        return
    mixing = mix_last_norm(loaded.model).weight
    mixing.data.copy_(rotation.T @ (gains.unsqueeze(1) * rotation))


def last_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm in front of the head; None where there is none by that name."""
    return getattr(model.get_decoder() if hasattr(model, "get_decoder") else None, "norm", None)


def mix_last_norm(model: PreTrainedModel) -> nn.Linear:
    """Put a matrix, which is not set yet, after the last norm of a decoder that has one."""
    decoder: Any = model.get_decoder()
    decoder.norm = MixedNorm(decoder.norm)
    return decoder.norm.mixing  # type: ignore[no-any-return] # a decoder is anything


def mixing_of(model: nn.Module) -> list[Tensor]:
    """The matrices after norms of a model, which it stores and reads beside its layers; one or none."""
    return [module.mixing.weight for module in model.modules() if isinstance(module, MixedNorm)]


def hadamard_like(size: int) -> Tensor:
    """An orthogonal matrix `[size, size]` float64 with entries of about the same size.

    Sylvester's Hadamard matrix for the power of two in `size`, times (Kronecker) the discrete Hartley transform for the
    odd rest, whose entries are at most sqrt(2) times the mean. It is exactly Hadamard for powers of two.
    """
    odd = size
    matrix = np.ones((1, 1))
    while odd % 2 == 0:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        odd //= 2
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    return torch.from_numpy(np.kron(np.cos(angle) + np.sin(angle), matrix) / np.sqrt(size))


def random_rotation(size: int, random: np.random.Generator) -> Tensor:
    """`diag(signs) H` with random signs: no channel stays alone in any direction, `[size, size]` float64."""
    signs = torch.from_numpy(random.choice([-1.0, 1.0], size))
    return signs.unsqueeze(1) * hadamard_like(size)


def _rotate_heads(block: nn.Module, rotation: Tensor) -> None:
    """Values of every head times `rotation`, and the output projection back."""
    width = len(rotation)
    values, output = _linear(block, "self_attn", "v_proj"), _linear(block, "self_attn", "o_proj")
    for tensor in (values.weight, values.bias):
        if tensor is not None:
            per_head = tensor.data.double().reshape(-1, width, *tensor.shape[1:])
            rotated = torch.einsum("hi...,io->ho...", per_head, rotation)
            tensor.data = rotated.reshape(tensor.shape).to(tensor.dtype)
    per_head = output.weight.data.double().reshape(len(output.weight), -1, width)
    output.weight.data = (per_head @ rotation).reshape(output.weight.shape).to(output.weight.dtype)


def _take_gains(norm: Any) -> Tensor:  # noqa: ANN401 - any RMSNorm
    """Gains `[hidden]` float64 of a norm, which has gains of one afterwards."""
    gains: Tensor = norm.weight.data.double()
    norm.weight.data = torch.ones_like(norm.weight.data)
    return gains


def _write(linear: nn.Linear, rotation: Tensor) -> None:
    """The output of a layer times `rotation`."""
    for start in range(0, linear.in_features, CHUNK):
        part = linear.weight.data[:, start : start + CHUNK]
        part.copy_(rotation.T @ part.double())
    if linear.bias is not None:
        linear.bias.data = (linear.bias.data.double() @ rotation).to(linear.bias.dtype)


def _read(module: nn.Linear | nn.Embedding, gains: Tensor | None, rotation: Tensor) -> None:
    """A weight `[n, hidden]` that reads the stream, with the norm's gains before it, or is copied into it."""
    for start in range(0, len(module.weight), CHUNK):
        part = module.weight.data[start : start + CHUNK]
        part.copy_((part.double() if gains is None else part.double() * gains) @ rotation)


def _merger_ends(loaded: LoadedModel) -> Iterator[nn.Linear]:
    """The layer of every merger that writes visual features into the residual stream: its last one."""
    for block in loaded.family.blocks(loaded.model):
        if block.group == "merger":
            yield [module for module in block.module.modules() if isinstance(module, nn.Linear)][-1]


def _check_block(name: str, block: nn.Module) -> None:
    children = {child for child, _ in block.named_children()}
    if children != PARTS:
        raise _unknown(f"'{name}' is made of {', '.join(sorted(children))}")
    for norm, (parent, *names) in READERS.items():
        _check_norm(f"'{name}.{norm}'", block.get_submodule(norm))
        for other in names:
            _linear(block, parent, other)
    linears = {child for child, module in block.get_submodule("mlp").named_children() if isinstance(module, nn.Linear)}
    if linears != {"gate_proj", "up_proj", "down_proj"}:
        raise _unknown(f"the MLP of '{name}' has the layers {', '.join(sorted(linears))}")


def _check_norm(name: str, norm: object) -> None:
    """Refuse a norm that is not `gains * h / rms(h)`, by what it does."""
    weight = getattr(norm, "weight", None)
    if not isinstance(norm, nn.Module) or not isinstance(weight, Tensor):
        raise _unknown(f"{name} has no gains")
    sample = torch.linspace(-1, 2, weight.numel(), device=weight.device, dtype=torch.float32)
    expected = weight.data.float() * sample / sample.square().mean().sqrt()
    with torch.no_grad():
        found = norm(sample.to(weight.dtype)).float()
    if not torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        raise _unknown(f"{name} is not an RMSNorm")


def _linear(block: nn.Module, parent: str, name: str) -> nn.Linear:
    module = getattr(block.get_submodule(parent), name, None)
    if not isinstance(module, nn.Linear):
        raise _unknown(f"there is no linear layer '{parent}.{name}'")
    return module


def _unknown(reason: str) -> ModelError:
    return ModelError(
        f"This language model cannot be rotated: {reason}.",
        "Choose another method, for example gptq, or qe without 'rotate'.",
    )
