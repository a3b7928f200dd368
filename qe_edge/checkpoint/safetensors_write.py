"""Writes a safetensors file tensor by tensor, so that no more than one of them has to be in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qe_edge.checkpoint.dtypes import torch_dtypes

ALIGNMENT = 8  # bytes of the header


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
    written = {dtype: name for name, dtype in torch_dtypes().items()}
    rank = {dtype: position for position, dtype in enumerate(written)}
    names = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": written[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            data = value(name, tensors[name]).contiguous().reshape(-1).view(torch.uint8)
            file.write(data.numpy().data)
