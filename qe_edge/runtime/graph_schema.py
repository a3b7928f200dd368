"""The parts of ONNX's file format in which tensors lie, for whoever checks a graph without the `onnx` package.

Source: onnx.proto of ONNX 1.18 (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto). The protobuf library reads the
bytes; fields that are not listed here are skipped.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeAlias

from google.protobuf.descriptor_pb2 import (  # type: ignore[import-untyped] # protobuf ships no types
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.descriptor_pool import DescriptorPool  # type: ignore[import-untyped] # likewise
from google.protobuf.message_factory import GetMessageClass  # type: ignore[import-untyped] # likewise

TensorMessage: TypeAlias = Any  # protobuf makes the class when this module is imported
PACKAGE = "qe_edge_graph"
FIELDS: dict[str, dict[str, tuple[int, str]]] = {  # message -> field -> number and type; `*` repeats
    "Model": {"graph": (7, "Graph"), "training_info": (20, "Training*"), "functions": (25, "Function*")},
    "Training": {"initialization": (1, "Graph"), "algorithm": (2, "Graph")},
    "Function": {"node": (7, "Node*"), "attribute_proto": (11, "Attribute*")},
    "Graph": {"node": (1, "Node*"), "initializer": (5, "Tensor*"), "sparse_initializer": (15, "SparseTensor*")},
    "Node": {"attribute": (5, "Attribute*")},
    "Attribute": {
        "t": (5, "Tensor"), "g": (6, "Graph"), "tensors": (10, "Tensor*"), "graphs": (11, "Graph*"),
        "sparse_tensor": (22, "SparseTensor"), "sparse_tensors": (23, "SparseTensor*"),
    },
    "SparseTensor": {"values": (1, "Tensor"), "indices": (2, "Tensor")},
    "Tensor": {
        "dims": (1, "int64*"), "data_type": (2, "int32"), "float_data": (4, "float*"), "int32_data": (5, "int32*"),
        "string_data": (6, "bytes*"), "int64_data": (7, "int64*"), "name": (8, "string"), "raw_data": (9, "bytes"),
        "double_data": (10, "double*"), "uint64_data": (11, "uint64*"), "external_data": (13, "Entry*"),
        "data_location": (14, "int32"),
    },
    "Entry": {"key": (1, "string"), "value": (2, "string")},
}  # fmt: skip


class DataType(IntEnum):
    """Element types of a tensor."""

    FLOAT = 1
    UINT8 = 2
    INT8 = 3
    UINT16 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    STRING = 8
    BOOL = 9
    FLOAT16 = 10
    DOUBLE = 11
    UINT32 = 12
    UINT64 = 13
    COMPLEX64 = 14
    COMPLEX128 = 15
    BFLOAT16 = 16
    UINT4 = 21
    INT4 = 22


EXTERNAL = 1  # a tensor's data_location


def _message_classes() -> dict[str, type[Any]]:
    """A class of the protobuf library for every message."""
    file = FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto2")
    for message, fields in FIELDS.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            label = FieldDescriptorProto.LABEL_REPEATED if kind.endswith("*") else FieldDescriptorProto.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number, label=label)
            bare = kind.rstrip("*")
            if bare in FIELDS:
                field.type, field.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{PACKAGE}.{bare}"
            else:
                field.type = FieldDescriptorProto.Type.Value(f"TYPE_{bare.upper()}")
    pool = DescriptorPool()
    pool.Add(file)
    return {message: GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{message}")) for message in FIELDS}


_CLASSES = _message_classes()
Model, Tensor = _CLASSES["Model"], _CLASSES["Tensor"]
