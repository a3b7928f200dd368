"""Which device computes, what the processor multiplies fast, and how data gets to a device and back.

On a GPU this has run on an H100 only, with the demo.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.system.errors import ResourceError

CPU = torch.device("cpu")
_FULL = re.compile("out of memory|ALLOC_FAILED")  # of CUDA, cuBLAS and cuSOLVER


def choose_device(name: str) -> torch.device:
    """The device of a name: "auto" (the first GPU, else the CPU), "cpu", or "cuda" with or without a number.

    Raises:
        ResourceError: If torch does not see that GPU.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
        >>> choose_device("tpu")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ResourceError: There is no device 'tpu'. Choose auto, cpu, cuda or, for the second
        GPU, cuda:1.
    """
    if name == "auto":
        return _initialised(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ResourceError(f"There is no device '{name}'.", "Choose auto, cpu, cuda or, for the second GPU, cuda:1.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(
            f"torch sees no GPU for '{name}'.",
            "Choose --device cpu, or install a CUDA build of torch; 'qe-edge doctor' tells what is missing.",
        )
    return _initialised(device)


def _initialised(device: torch.device) -> torch.device:
    """The device; torch initialises CUDA's linear algebra at its first use, and fails where two threads are first."""
    if device.type == "cuda":
        torch.linalg.solve_triangular(
            torch.linalg.cholesky(torch.eye(2, device=device)), torch.eye(2, device=device), upper=False
        )
    return device


@contextmanager
def fitting(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error of a device into one sentence.

    Args:
        device: The device that computes inside the context.
        what: The data that its memory should hold, for the message.
        remedy: The second sentence of the message: what to choose instead.

    Raises:
        ResourceError: In place of torch's errors.

    Example:
        >>> gpu = torch.device("cuda", 0)
        >>> with fitting(gpu, "this layer", "Choose --device cpu."):
        ...     raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ResourceError: The memory of cuda:0 does not hold this layer. Choose --device cpu.
    """
    try:
        yield
    except RuntimeError as error:  # libraries of linear algebra have no kind of their own for it
        if device == CPU or not (isinstance(error, torch.cuda.OutOfMemoryError) or _FULL.search(str(error))):
            raise
        raise ResourceError(f"The memory of {device} does not hold {what}.", remedy) from error


@contextmanager
def moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """A module is on a device while the context is open, and in the CPU's memory again afterwards.

    Raises:
        ResourceError: If the device's memory does not suffice.

    Example:
        >>> block = nn.Linear(4, 4)
        >>> with moved(block, CPU):  # on "cuda" its tensors lie in the GPU's memory inside
        ...     print(block.weight.device)
        cpu
    """
    if device == CPU:
        yield
        return
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    kept = [(tensor, tensor.data) for tensor in tensors.values()]
    try:
        with fitting(device, "one block and its activations", "Choose --device cpu."):
            for tensor, data in kept:
                tensor.data = data.to(device)
            yield
    finally:
        for tensor, data in kept:  # nothing changes them meanwhile
            tensor.data = data


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401 - arguments of any block
    """A value with all tensors in its tuples, lists and mappings on a device.

    Example:
        >>> arguments = {"hidden": torch.ones(2, 3), "masks": [torch.ones(2)], "causal": True}
        >>> there = to_device(arguments, torch.device("meta"))
        >>> there["hidden"].device, there["masks"][0].device, there["causal"]
        (device(type='meta'), device(type='meta'), True)
    """
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(one, device) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(one, device) for one in value)
    return value


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16; False where torch does not say.

    Example:
        >>> dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32
    """
    return bool({"avx512_bf16", "amx_bf16"} & _instructions())


def multiplies_int8() -> bool:
    """Whether the processor has instructions for products of int8 that torch uses; False where torch does not say.

    Example:
        >>> kind = "int8 products" if multiplies_int8() else "float32 products"
    """
    return hasattr(torch, "_int_mm") and bool({"avx512_vnni", "amx_int8"} & _instructions())


@cache
def _instructions() -> set[str]:
    """What torch calls the processor's instruction sets; nothing where it does not say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return {name for name, there in (ask() if ask else {}).items() if there is True}
