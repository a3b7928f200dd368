"""Whether a model fits into the memory that is free, before its weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from qe_edge.system.errors import ResourceError


def check_memory(source: str, dtype: torch.dtype | str) -> None:
    """Refuse a local model whose weights alone exceed the free memory.

    Raises:
        ResourceError: If they do.

    Example:
        >>> from qe_edge.demo import model_path
        >>> check_memory(str(model_path()), "auto")  # fine: 11 MB
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    check_free(size * (2 if dtype == torch.float32 else 1))


def check_memory_outside(model: nn.Module, streamed: Sequence[nn.Module]) -> None:
    """Refuse a model whose parts that are not streamed, with the largest streamed one, exceed the free memory.

    Args:
        model: The model; its weights may be placeholders.
        streamed: Its parts that are in memory one at a time.

    Raises:
        ResourceError: If they do, in float32.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> check_memory_outside(model, [model[1]])  # fine
    """
    inside = {id(parameter): parameter.numel() for module in streamed for parameter in module.parameters()}
    outside = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in inside)
    largest = max((sum(parameter.numel() for parameter in module.parameters()) for module in streamed), default=0)
    check_free(4 * (outside + largest))


def check_free(needed: int) -> None:
    """Refuse a model that needs more bytes than are free.

    Raises:
        ResourceError: If it does.

    Example:
        >>> check_free(1 << 20)  # fine: 1 MiB
        >>> check_free(1 << 60)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ResourceError: The model needs 1073741824.0 GiB of memory and ... GiB are free. Use
        a machine with more memory; engines can be copied to the device afterwards.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"The model needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are free.",
            "Use a machine with more memory; engines can be copied to the device afterwards.",
        )
