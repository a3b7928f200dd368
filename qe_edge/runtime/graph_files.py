"""Checks a graph's file before any library opens it: tensors have the bytes that they announce, in this folder.

Versions of ONNX Runtime and onnx-ir differ in which paths of external data they follow, so none of them is asked.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path

from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped] # it ships no types

from qe_edge.checkpoint.integrity import check_inside
from qe_edge.models.texts import shortened
from qe_edge.runtime.graph_schema import EXTERNAL, DataType, Model, Tensor, TensorMessage
from qe_edge.system.errors import ArtifactError

MAX_GRAPH_BYTES = 2**31 - 1  # of a protobuf message; weights lie beside it
DATA = ".data"  # external data lies beside its graph under the graph's name with this ending
REMEDY = "Export the model again."
TYPED: dict[str, tuple[int, ...]] = {
    "float_data": (DataType.FLOAT, DataType.COMPLEX64),
    "double_data": (DataType.DOUBLE, DataType.COMPLEX128),
    "int64_data": (DataType.INT64,),
    "uint64_data": (DataType.UINT32, DataType.UINT64),
    "string_data": (DataType.STRING,),
}  # every other type lies in int32_data
BITS: dict[int, int] = {
    DataType.FLOAT: 32, DataType.DOUBLE: 64, DataType.FLOAT16: 16, DataType.BFLOAT16: 16,
    DataType.INT8: 8, DataType.INT16: 16, DataType.INT32: 32, DataType.INT64: 64,
    DataType.UINT8: 8, DataType.UINT16: 16, DataType.UINT32: 32, DataType.UINT64: 64,
    DataType.BOOL: 8, DataType.INT4: 4, DataType.UINT4: 4,
}  # fmt: skip


def check_graph_file(folder: Path, file: str) -> None:
    """Read a graph without its weights and check where these are.

    Args:
        folder: Folder of the graph.
        file: Its name; external data may lie in the files of `is_data_of`, and nowhere else.

    Raises:
        ArtifactError: If the graph cannot be read, or a tensor does not have the bytes that it announces.

    Example:
        >>> _ = Path("language.onnx").write_bytes(b"no graph")
        >>> check_graph_file(Path(), "language.onnx")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'language.onnx' is no ONNX graph, or was cut off: ...
    """
    path = folder / file
    if path.stat().st_size > MAX_GRAPH_BYTES:
        raise ArtifactError(f"'{path}' has more than {MAX_GRAPH_BYTES} bytes, which no graph has.", REMEDY)
    model = Model()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise ArtifactError(f"'{path}' is no ONNX graph, or was cut off: {_line(error)}", REMEDY) from error
    spans: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for tensor in _tensors(model):
        size = _announced_bytes(path, tensor)
        if tensor.data_location == EXTERNAL or tensor.external_data:
            location, start, stop = _place(path, tensor, size)
            data = folder / location
            if not data.is_file():
                raise _wrong(path, tensor, f"lies in '{data.name}', which is missing")
            check_inside(folder, data)
            if stop > data.stat().st_size:
                raise _wrong(path, tensor, f"goes beyond the end of '{data.name}'")
            if start < stop:
                spans[location].add((start, stop))
        else:
            _check_inline(path, tensor, size)
    for location, places in spans.items():
        for (_, stop), (start, _) in itertools.pairwise(sorted(places)):
            if start < stop:
                raise ArtifactError(f"Tensors of '{path}' overlap in '{location}' at byte {start}.", REMEDY)


def is_data_of(file: str, graph: str) -> bool:
    """Whether a file may hold external data of a graph; large data is cut into shards, numbered as onnx_ir does it.

    Example:
        >>> is_data_of("language.onnx.data", "language.onnx")
        True
        >>> is_data_of("language-00002-of-00003.onnx.data", "language.onnx")
        True
        >>> is_data_of("visual.onnx.data", "language.onnx")
        False
    """
    stem = re.escape(graph.removesuffix(".onnx"))
    return re.fullmatch(rf"{stem}(-[0-9]{{5}}-of-[0-9]{{5}})?\.onnx{re.escape(DATA)}", file) is not None


def _announced_bytes(path: Path, tensor: TensorMessage) -> int | None:
    """Bytes of a tensor by its type and shape; None for strings."""
    if any(size < 0 for size in tensor.dims):
        raise _wrong(path, tensor, f"has the shape {_shape(tensor)}")
    if tensor.data_type == DataType.STRING:
        return None
    if tensor.data_type not in BITS:
        raise _wrong(path, tensor, f"has the unknown type {tensor.data_type}")
    return (prod(map(int, tensor.dims)) * BITS[tensor.data_type] + 7) // 8


def _place(path: Path, tensor: TensorMessage, size: int | None) -> tuple[str, int, int]:
    """File, first byte and end of external data."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if len(entries) != len(tensor.external_data) or tensor.data_location != EXTERNAL:
        raise _wrong(path, tensor, "has no clear place outside the graph")
    if not is_data_of(location, path.name):
        wanted = f"only '{path.name}{DATA}' in the same folder is read"
        raise _wrong(path, tensor, f"lies in '{shortened(location)}', and {wanted}")
    numbers = {key: entries.get(key, "0") for key in ("offset", "length")}
    for key, text in numbers.items():
        if not (text.isascii() and text.isdecimal() and len(text) < 19):
            raise _wrong(path, tensor, f"has the {key} '{shortened(text)}'")
    start, length = int(numbers["offset"]), int(numbers["length"])
    if size is None or length != size or tensor.raw_data:
        raise _wrong(path, tensor, f"announces {length} bytes outside the graph and has the shape {_shape(tensor)}")
    return location, start, start + length


def _check_inline(path: Path, tensor: TensorMessage, size: int | None) -> None:
    """Data in the graph itself: bytes, or a list of one type."""
    if tensor.HasField("raw_data"):
        if size != len(tensor.raw_data):
            raise _wrong(path, tensor, f"has {len(tensor.raw_data)} bytes and the shape {_shape(tensor)}")
        return
    field = next((field for field, types in TYPED.items() if tensor.data_type in types), "int32_data")
    elements = prod(tensor.dims)
    values = len(getattr(tensor, field))
    wanted = {elements}
    if tensor.data_type in (DataType.INT4, DataType.UINT4):
        wanted = {(elements + 1) // 2}
    if values not in wanted:
        raise _wrong(path, tensor, f"has {values} values and the shape {_shape(tensor)}")


def _tensors(message: Message) -> Iterator[TensorMessage]:
    """Every tensor of a graph: of initializers, attributes, subgraphs and functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if isinstance(value, Message) else value:
            if isinstance(part, Tensor):
                yield part
            else:
                yield from _tensors(part)


def _wrong(path: Path, tensor: TensorMessage, what: str) -> ArtifactError:
    return ArtifactError(f"'{path}' is damaged: its tensor '{shortened(tensor.name)}' {what}.", REMEDY)


def _shape(tensor: TensorMessage) -> str:
    return shortened(str(list(tensor.dims)))


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()).rstrip('.')[:200] or type(error).__name__}."
