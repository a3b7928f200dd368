"""Token embeddings and heads, which are large and hardly needed: they stay in their files while a model is quantized.

A forward pass reads the rows of its tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.models.stored import StoredWeights
from qe_edge.models.streaming import patched

ROWS = 1 << 14  # of a head that are in float32 at a time


def embeddings_of(model: nn.Module) -> dict[str, nn.Embedding]:
    """The token embeddings of a model by their paths: its own, and others with as many rows (as Gemma 4 has one).

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> list(embeddings_of(load_model("demo").model))
        ['model.language_model.embed_tokens']
    """
    own = _part(model, "get_input_embeddings")
    if not isinstance(own, nn.Embedding):
        return {}
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {name: module for name, module in found.items() if module.num_embeddings == own.num_embeddings}


def tables_of(model: nn.Module) -> dict[str, nn.Module]:
    """The token embeddings and the head of a model by their paths.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> list(tables_of(load_model("demo").model))
        ['model.language_model.embed_tokens', 'lm_head']
    """
    head = _part(model, "get_output_embeddings")
    found: dict[str, nn.Module] = dict(embeddings_of(model))
    return found | {name: part for name, part in model.named_modules() if part is head and isinstance(part, nn.Linear)}


@contextmanager
def read_by_rows(model: nn.Module, stored: StoredWeights) -> Iterator[None]:
    """Token embeddings read the rows that they need, in float32, while the context is open.

    Example:
        >>> from qe_edge.models.loading import load_outside_blocks
        >>> loaded = load_outside_blocks("demo")
        >>> embedding = loaded.model.get_input_embeddings()
        >>> loaded.stored.is_absent(embedding.weight)
        True
        >>> with read_by_rows(loaded.model, loaded.stored):
        ...     found = embedding(torch.tensor([[5, 6, 5]]))
        >>> tuple(found.shape), found.dtype, bool(found.isfinite().all())
        ((1, 3, 256), torch.float32, True)
    """
    with patched([(module, _by_rows(name, module, stored)) for name, module in embeddings_of(model).items()]):
        yield


@contextmanager
def head_in_parts(model: nn.Module, stored: StoredWeights) -> Iterator[None]:
    """The head computes in float32 from the weight of its file, some rows at a time, while the context is open.

    Its output has a gradient for its input, and none for its weight.

    Example:
        >>> from qe_edge.models.loading import load_outside_blocks
        >>> loaded, hidden = load_outside_blocks("demo"), torch.ones(1, 256, requires_grad=True)
        >>> with head_in_parts(loaded.model, loaded.stored):
        ...     loaded.model.lm_head(hidden).sum().backward()
        >>> bool(hidden.grad.isfinite().all())
        True
    """
    embeddings = embeddings_of(model)
    with ExitStack() as stack:
        for name, head in tables_of(model).items():
            if name not in embeddings:
                stack.enter_context(stored.held(name, head))
                stack.enter_context(patched([(head, _in_parts(head))]))
        yield


def _in_parts(head: nn.Module) -> Callable[[Tensor], Tensor]:
    weight, bias = head.get_parameter("weight").detach(), getattr(head, "bias", None)

    def forward(hidden: Tensor) -> Tensor:
        logits: Tensor = _HeadInParts.apply(hidden, weight)  # type: ignore[no-untyped-call] # torch has no types here
        return logits if bias is None else logits + bias.detach().float()

    return forward


class _HeadInParts(torch.autograd.Function):
    """`hidden @ weight^T`, where no more than `ROWS` rows of the weight are in float32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        """Compute the logits `[..., rows]` of hidden states `[..., in]`."""
        ctx.weight = weight
        logits = hidden.new_empty(*hidden.shape[:-1], len(weight))
        for start in range(0, len(weight), ROWS):
            logits[..., start : start + ROWS] = hidden @ weight[start : start + ROWS].to(hidden).T
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        """Return the gradient of the hidden states."""
        parts = (
            gradient[..., start : start + ROWS] @ ctx.weight[start : start + ROWS].to(gradient)
            for start in range(0, len(ctx.weight), ROWS)
        )
        total = next(parts)
        for part in parts:
            total += part
        return total, None


def _by_rows(name: str, module: nn.Embedding, stored: StoredWeights) -> Callable[[Tensor], Tensor]:
    def forward(input_ids: Tensor) -> Tensor:
        numbers, places = torch.unique(input_ids, return_inverse=True)
        before = module.weight.data, module.padding_idx
        rows = stored.rows(f"{name}.weight", module.weight, numbers.cpu())
        module.weight.data, module.padding_idx = rows.to(input_ids.device, torch.float32), None
        try:
            found: Tensor = type(module).forward(module, places)  # some scale what they find
        finally:
            module.weight.data, module.padding_idx = before
        return found

    return forward


def _part(model: nn.Module, getter: str) -> object:
    """What transformers' getter finds; None where a model has no such part."""
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
