"""Orthogonal changes of basis of a language model that keep its outputs (QuaRot, SpinQuant).

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

from qe_edge.models.family import Block
from qe_edge.models.loading import LoadedModel
from qe_edge.models.stored import Change
from qe_edge.numerics.orthogonal import Rotation, hadamard_like, random_rotation
from qe_edge.system.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHED = 1 << 19  # numbers that are rotated at a time
PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
READERS = {
    "input_layernorm": ("self_attn", "q_proj", "k_proj", "v_proj"),
    "post_attention_layernorm": ("mlp", "gate_proj", "up_proj"),
}
WRITERS = (("self_attn", "o_proj"), ("mlp", "down_proj"))


class MixedNorm(nn.Module):
    """A norm followed by a matrix: the norm's gains, in front of a head that shares the rotated embedding.

    Args:
        norm: The norm.

    Example:
        >>> norm = MixedNorm(nn.RMSNorm(8))
        >>> tuple(norm.mixing.weight.shape), tuple(norm(torch.ones(2, 8)).shape)
        ((8, 8), (2, 8))
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.get_parameter("weight")
        self.norm = norm
        self.mixing = nn.Linear(weight.numel(), weight.numel(), bias=False, dtype=weight.dtype, device=weight.device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm and matrix of `[..., hidden]`."""
        mixed: Tensor = self.mixing(self.norm(hidden))
        return mixed


def rotate_language_model(loaded: LoadedModel, seed: int) -> None:
    """Rotate a decoder. Every tensor keeps its dtype; tensors that are not in memory are rotated when they are read.

    Raises:
        ModelError: If the blocks are not RMSNorm, attention, RMSNorm, gated MLP, as those of Llama and Qwen2.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded, ids = load_model("demo", torch.float32), torch.tensor([[5, 6, 7]])
        >>> before = loaded.model(input_ids=ids).logits
        >>> rotate_language_model(loaded, seed=0)
        >>> (loaded.model(input_ids=ids).logits - before).abs().max().item() < 1e-3  # the same outputs
        True
    """
    blocks = [block for block in loaded.family.blocks(loaded.model) if block.group == "language"]
    embedding, norm, head = _checked_ends(loaded, blocks)
    config = loaded.model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    names = {id(tensor): name for name, tensor in loaded.model.state_dict(keep_vars=True).items()}
    rotation = random_rotation(embedding.embedding_dim, np.random.default_rng(seed))
    in_head = hadamard_like(width)

    def change(tensor: Tensor | None, how: Change) -> None:
        if tensor is not None:
            loaded.stored.change(names[id(tensor)], tensor, how)

    def take_gains(norm: nn.Module) -> Tensor:
        """Gains `[hidden]` float64 of a norm, which has gains of one afterwards."""
        weight = norm.get_parameter("weight")
        gains = loaded.stored.value(names[id(weight)], weight).double()
        change(weight, torch.ones_like)
        return gains

    def write(linear: nn.Linear) -> None:
        change(linear.weight, _columns(rotation))
        change(linear.bias, _rows(rotation))

    tied = head.weight is embedding.weight
    change(embedding.weight, _rows(rotation))
    for linear in _merger_ends(loaded):
        write(linear)
    for block in blocks:
        for name, (parent, *readers) in READERS.items():
            gains = take_gains(block.module.get_submodule(name))
            for reader in readers:
                change(_linear(block.module, parent, reader).weight, _rows(rotation, gains))
        values, output = (_linear(block.module, "self_attn", name) for name in ("v_proj", "o_proj"))
        change(values.weight, _columns(in_head))
        change(values.bias, _rows(in_head))
        change(output.weight, _rows(in_head))
        for parent, name in WRITERS:
            write(_linear(block.module, parent, name))
    gains = take_gains(norm)
    if not tied:
        change(head.weight, _rows(rotation, gains))
        return
    matrix = rotation.matrix()
    mix_last_norm(loaded.model).weight.data.copy_(matrix.T @ (gains.unsqueeze(1) * matrix))


def residual_norms(block: nn.Module) -> dict[str, nn.Module]:
    """For each layer of a block that writes into the residual stream, the norm that reads the stream before it.

    The result is empty for blocks that are not norm, attention, norm, gated MLP.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> block = next(block for block in loaded.family.blocks(loaded.model) if block.group == "language")
        >>> {name: type(norm).__name__ for name, norm in residual_norms(block.module).items()}
        {'self_attn.o_proj': 'Qwen2VLRMSNorm', 'mlp.down_proj': 'Qwen2VLRMSNorm'}
    """
    if {child for child, _ in block.named_children()} != PARTS:
        return {}
    return {
        f"{parent}.{name}": block.get_submodule(norm)
        for norm, (parent, name) in zip(READERS, WRITERS, strict=True)
        if hasattr(block.get_submodule(parent), name)
    }


def last_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm in front of the head; None where there is none by that name.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> type(last_norm(load_model("demo").model)).__name__
        'Qwen2VLRMSNorm'
    """
    return getattr(model.get_decoder() if hasattr(model, "get_decoder") else None, "norm", None)


def mix_last_norm(model: PreTrainedModel) -> nn.Linear:
    """Put a matrix, which is not set yet, after the last norm of a decoder that has one.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> model = load_model("demo").model
        >>> tuple(mix_last_norm(model).weight.shape)
        (256, 256)
    """
    decoder: Any = model.get_decoder()
    mixed = MixedNorm(decoder.norm)
    decoder.norm = mixed
    return mixed.mixing


def mixing_of(model: nn.Module) -> list[Tensor]:
    """Return the matrices after a model's norms, which are stored beside its layers: one or none.

    Example:
        >>> model = nn.Sequential(MixedNorm(nn.RMSNorm(8)), nn.Linear(8, 8))
        >>> len(mixing_of(model)), len(mixing_of(nn.Linear(8, 8)))
        (1, 0)
    """
    return [module.mixing.weight for module in model.modules() if isinstance(module, MixedNorm)]


def _rows(rotation: Rotation, gains: Tensor | None = None) -> Change:
    """Rows of a tensor `[..., k * size]` times the rotation, k times side by side; after `gains` `[size]` of a norm."""
    size, factors = len(rotation.signs), None if gains is None else gains.float()

    def change(tensor: Tensor) -> Tensor:
        changed = torch.empty_like(tensor)
        rows, found = tensor.reshape(-1, size), changed.view(-1, size)
        piece = max(1, CACHED // size)
        for start in range(0, len(rows), piece):
            part = rows[start : start + piece].float()
            found[start : start + piece] = rotation(part if factors is None else part * factors)
        return changed

    return change


def _columns(rotation: Rotation) -> Change:
    """Columns of a weight `[k * size, in]` times the rotation, k times below each other."""
    rows = _rows(rotation)
    return lambda tensor: rows(tensor.T.contiguous()).T.contiguous()


def _merger_ends(loaded: LoadedModel) -> Iterator[nn.Linear]:
    """The layer of every merger that writes visual features into the residual stream: its last one."""
    for block in loaded.family.blocks(loaded.model):
        if block.group == "merger":
            yield [module for module in block.module.modules() if isinstance(module, nn.Linear)][-1]


def _checked_ends(loaded: LoadedModel, blocks: list[Block]) -> tuple[nn.Embedding, nn.Module, nn.Linear]:
    """Embedding, last norm and head of a decoder that can be rotated.

    Raises:
        ModelError: If it cannot.
    """
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    if not blocks or not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise _unknown("it has no language model with a head")
    for block in blocks:
        _check_block(loaded, block)
    return embedding, check_norm("the last norm", last_norm(loaded.model)), head


def _check_block(loaded: LoadedModel, block: Block) -> None:
    module, name = block.module, block.name
    children = {child for child, _ in module.named_children()}
    if children != PARTS:
        raise _unknown(f"'{name}' is made of {', '.join(sorted(children))}")
    for norm, (parent, *readers) in READERS.items():
        path = f"{name}.{norm}"
        with loaded.stored.held(path, module.get_submodule(norm)):
            check_norm(f"'{path}'", module.get_submodule(norm))
        for reader in readers:
            _linear(module, parent, reader)
    linears = {child for child, part in module.get_submodule("mlp").named_children() if isinstance(part, nn.Linear)}
    if linears != {"gate_proj", "up_proj", "down_proj"}:
        raise _unknown(f"the MLP of '{name}' has the layers {', '.join(sorted(linears))}")


def check_norm(name: str, norm: object) -> nn.Module:
    """Refuse a norm that is not `gains * h / rms(h)`, by what it does; returns it.

    Args:
        name: Its name in the message.
        norm: The module in the place of a norm.

    Raises:
        ModelError: If it is another module.

    Example:
        >>> _ = check_norm("the last norm", nn.RMSNorm(8))  # fine
        >>> check_norm("the last norm", nn.LayerNorm(8))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: This language model cannot be rotated: the last norm is not an RMSNorm.
        Choose another method, for example gptq, or qe without 'rotate'.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(norm, nn.Module) or not isinstance(weight, Tensor):
        raise _unknown(f"{name} has no gains")
    sample = torch.linspace(-1, 2, weight.numel(), device=weight.device, dtype=torch.float32)
    expected = weight.data.float() * sample / sample.square().mean().sqrt()
    with torch.no_grad():
        found = norm(sample.to(weight.dtype)).float()
    if not torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max())):
        raise _unknown(f"{name} is not an RMSNorm")
    return norm


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
