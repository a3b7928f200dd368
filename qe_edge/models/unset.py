"""Models whose parameters have shapes and no data, until a checkpoint's tensors take their places."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


@contextmanager
def unset_parameters() -> Iterator[None]:
    """Modules that this thread makes while the context is open have parameters on the meta device; buffers are real.

    A model of 7 billion parameters takes no memory so, and no time for random numbers. Rotary frequencies and other
    buffers, which no checkpoint holds, are computed as ever.

    Example:
        >>> with unset_parameters():
        ...     model = nn.BatchNorm1d(4)
        >>> model.weight.device.type, model.running_var.device.type
        ('meta', 'cpu')
    """
    owner = threading.get_ident()

    def unset(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> Any:  # noqa: ANN401 - torch says None
        if parameter is None or parameter.is_meta or threading.get_ident() != owner:
            return None  # it stays as it is
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(unset)
    try:
        yield
    finally:
        handle.remove()
