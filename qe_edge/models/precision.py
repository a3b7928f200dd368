"""Models in float32, and back in the precision that they came in.

`in_float32` keeps the tensors from before and puts them back. `make_float32` and `restore_dtypes` keep nothing, because
a second copy of a large embedding, or of blocks whose layers are replaced meanwhile, would take more memory; the way
back is exact, since every bfloat16 and float16 number is one of float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qe_edge.system.device import CPU


def own_tensors(modules: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers of modules themselves, without those of their children.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
        >>> [tuple(tensor.shape) for tensor in own_tensors(model.modules())], list(own_tensors([model]))
        ([(2, 4), (2,)], [])
    """
    for module in modules:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)


@contextmanager
def in_float32(modules: Iterable[nn.Module], device: torch.device = CPU) -> Iterator[None]:
    """Put the own tensors of `modules` on a device in float32; afterwards the earlier tensors are back.

    Example:
        >>> layer = nn.Linear(2, 2).bfloat16()
        >>> with in_float32(layer.modules()):
        ...     layer.weight.dtype
        torch.float32
        >>> layer.weight.dtype
        torch.bfloat16
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    for tensor in own_tensors(modules):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        if (tensor.dtype, tensor.device) != (dtype, device) and id(tensor) not in kept:
            kept[id(tensor)] = (tensor, tensor.data)
            tensor.data = tensor.data.to(device).to(dtype)  # half as many bytes to the device
    try:
        yield
    finally:
        for tensor, data in kept.values():
            tensor.data = data


def make_float32(modules: Iterable[nn.Module]) -> None:
    """Bring own tensors of `modules` to float32, for good or until `restore_dtypes`.

    Example:
        >>> layer = nn.Linear(2, 2).bfloat16()
        >>> make_float32(layer.modules())
        >>> layer.weight.dtype
        torch.float32
    """
    for tensor in own_tensors(modules):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()


def restore_dtypes(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Bring tensors of a model to the types that `dtypes` gives their names; the others stay.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> restore_dtypes(layer, {"weight": torch.bfloat16})
        >>> layer.weight.dtype, layer.bias.dtype
        (torch.bfloat16, torch.float32)
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        wanted = dtypes.get(name)
        if wanted is not None and tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)
