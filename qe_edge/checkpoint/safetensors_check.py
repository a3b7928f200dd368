"""Checks a safetensors file's header against its size before any tensor is read."""

from __future__ import annotations

import stat
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qe_edge.checkpoint.dtypes import KINDS
from qe_edge.system.errors import ArtifactError
from qe_edge.system.json_files import parse_json

MAX_HEADER = 100 * 2**20
MAX_DIMENSIONS, MAX_SIZE = 64, 2**48
REMEDY = "Download or write the file again."


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Validate the header of a safetensors file and return dtype and shape of every tensor.

    Raises:
        ArtifactError: If there is no such file, it is truncated, or its header contradicts itself.

    Example:
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> save_file({"bias": np.zeros(3, np.float16)}, "sound.safetensors")
        >>> check_safetensors(Path("sound.safetensors"))
        {'bias': ('F16', (3,))}
        >>> _ = Path("cut.safetensors").write_bytes(Path("sound.safetensors").read_bytes()[:-1])
        >>> check_safetensors(Path("cut.safetensors"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'cut.safetensors' is damaged: 78 bytes are announced and 77 are
        there. Download or write the file again.
    """
    header, length, size = _read_header(path)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, span = _entry(path, name, entry)
        tensors[name] = (dtype, shape)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _damaged(path, "its tensors overlap or leave gaps")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, f"{8 + length + end} bytes are announced and {size} are there")
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:  # its own rules are stricter: characters, metadata, types that it knows
        raise ArtifactError(f"'{path}' cannot be read by safetensors: {str(error)[:200]}.", REMEDY) from error
    return tensors


def tensor_offset(path: Path, name: str) -> int:
    r"""The byte of a file at which a tensor begins that `check_safetensors` has found in it.

    Raises:
        ArtifactError: If there is no such tensor any more, or its entry is damaged.

    Example:
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> save_file({"codes": np.array([7, 8], np.int8), "scales": np.ones(2, np.float32)}, "two.safetensors")
        >>> Path("two.safetensors").read_bytes()[tensor_offset(Path("two.safetensors"), "codes") :]
        b'\x07\x08'
    """
    header, length, _ = _read_header(path)
    return 8 + length + _entry(path, name, header.get(name))[2][0]


def _read_header(path: Path) -> tuple[dict[str, object], int, int]:
    """The table that describes the tensors, its length in bytes, and the file's size."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
            raise ArtifactError(f"'{path}' is not a file.", REMEDY)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if found.st_size < 8 or not 2 <= length <= min(MAX_HEADER, found.st_size - 8):
                raise _damaged(path, "its header is cut off")
            data = file.read(length)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        raise ArtifactError(f"'{path}' cannot be read: {error}.", REMEDY) from error
    try:
        header = parse_json(data.decode(), path, ArtifactError, REMEDY, strict=True)
    except (UnicodeDecodeError, ArtifactError) as error:
        raise _damaged(path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a table")
    return header, length, found.st_size


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and byte span of one header entry."""
    name = ascii(name[:200])[1:-1]
    if not isinstance(entry, dict):
        raise _damaged(path, f"the entry of '{name}' is not a table")
    dtype, shape, offsets = entry.get("dtype"), _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if not isinstance(dtype, str):
        raise _damaged(path, f"tensor '{name}' has no type")
    if dtype not in KINDS:
        raise ArtifactError(
            f"Tensor '{name}' of '{path}' has the type '{ascii(dtype[:40])[1:-1]}', which QE-Edge does not know.",
            "Convert it to bfloat16 with the tool that wrote it, or download the file again.",
        )
    if shape is None or offsets is None or len(offsets) != 2:
        raise _damaged(path, f"tensor '{name}' has no valid shape or offsets")
    start, stop = offsets
    if start > stop or (stop - start) * 8 != prod(shape) * KINDS[dtype].bits:
        raise _damaged(path, f"tensor '{name}' does not fill its {stop - start} bytes")
    return dtype, shape, (start, stop)


def _sizes(values: object) -> tuple[int, ...] | None:
    """Whole numbers of the size of a dimension or a place in a file, or None for anything else."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < MAX_SIZE for value in values):
        return None
    if len(values) > MAX_DIMENSIONS:
        return None
    return tuple(values)


def _damaged(path: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"'{path}' is damaged: {reason}.", REMEDY)
