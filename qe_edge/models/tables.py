"""Token embeddings and heads, which are large and hardly needed: they stay in their files while a model is quantized.

A forward pass reads the rows of its tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qe_edge.models.stored import StoredWeights
from qe_edge.models.streaming import patched


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
    heads = {name: module for name, module in model.named_modules() if module is head and isinstance(head, nn.Linear)}
    return {**embeddings_of(model), **heads}


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
