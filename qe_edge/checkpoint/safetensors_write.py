"""Writes a safetensors file tensor by tensor, so that no more than one of them has to be in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qe_edge.checkpoint.dtypes import torch_dtypes

ALIGNMENT = 8  # bytes of the header
ROWS = 4096  # of a table that are in memory at a time


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    value: Callable[[str, Tensor], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the same bytes as `save_file` of the safetensors library.

    Args:
        tensors: Shape and dtype of every tensor by name; the data may be elsewhere.
        path: The file.
        value: The data of a tensor, called once for each, when it is written.
        metadata: Strings for the header.

    Raises:
        KeyError: If a tensor has a dtype that is not in `torch_dtypes`.

    Example:
        >>> from safetensors.torch import load_file
        >>> sizes = {"weight": torch.empty(2, 3, device="meta")}  # holds no data
        >>> write_tensors(sizes, Path("ones.safetensors"), lambda name, tensor: torch.ones(tensor.shape))
        >>> load_file("ones.safetensors")
        {'weight': tensor([[1., 1., 1.],
                [1., 1., 1.]])}
    """
    written = _names()
    rank = {dtype: position for position, dtype in enumerate(written)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": written[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    with path.open("wb") as file:
        file.write(_header(header))
        for name in names:  # a tensor has no name here, so that it is gone when the next one is read
            file.write(value(name, tensors[name]).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_rows(path: Path, name: str, parts: Sequence[Tensor]) -> None:
    """Write one tensor `[rows, widths of all parts]` whose rows are those of the parts, one after the other.

    Args:
        path: The file.
        name: The tensor's name.
        parts: Tables `[rows, width]` of one type.

    Raises:
        KeyError: If they have a dtype that is not in `torch_dtypes`.
        ValueError: If they differ in type or in their number of rows.

    Example:
        >>> from safetensors.torch import load_file
        >>> write_rows(Path("table.safetensors"), "table", [torch.ones(2, 1), torch.zeros(2, 2)])
        >>> load_file("table.safetensors")
        {'table': tensor([[1., 0., 0.],
                [1., 0., 0.]])}
    """
    rows, dtype = len(parts[0]), parts[0].dtype
    if any(len(part) != rows or part.dtype != dtype for part in parts):
        raise ValueError(f"tables of {[(len(part), part.dtype) for part in parts]} have no rows in common")
    shape = [rows, sum(part.shape[1] for part in parts)]
    size = shape[0] * shape[1] * dtype.itemsize
    with path.open("wb") as file:
        file.write(_header({name: {"dtype": _names()[dtype], "shape": shape, "data_offsets": [0, size]}}))
        for start in range(0, rows, ROWS):
            joined = torch.cat([part[start : start + ROWS].detach() for part in parts], dim=1).contiguous()
            file.write(joined.reshape(-1).view(torch.uint8).numpy().data)


def _names() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in torch_dtypes().items()}


def _header(table: dict[str, object]) -> bytes:
    """The beginning of a file: the table's length, and the table."""
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
