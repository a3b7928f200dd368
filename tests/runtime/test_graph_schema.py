"""The fields in which a graph's tensors lie are ONNX's own, and none is missing."""

import onnx
import pytest
from google.protobuf.descriptor import Descriptor

from qe_edge.runtime.graph_schema import EXTERNAL, FIELDS, DataType

NAMES = {
    "Model": "ModelProto", "Training": "TrainingInfoProto", "Function": "FunctionProto", "Graph": "GraphProto",
    "Node": "NodeProto", "Attribute": "AttributeProto", "SparseTensor": "SparseTensorProto", "Tensor": "TensorProto",
    "Entry": "StringStringEntryProto",
}  # fmt: skip
OURS = {theirs: ours for ours, theirs in NAMES.items()}
LEADING = set(NAMES) - {"Tensor", "Entry"}  # to tensors


def test_every_field_has_the_number_and_the_type_of_onnx() -> None:
    for message, fields in FIELDS.items():
        descriptor = getattr(onnx, NAMES[message]).DESCRIPTOR
        for name, (number, kind) in fields.items():
            field = descriptor.fields_by_name[name]
            if field.message_type is not None:
                found = OURS[field.message_type.name]
            else:  # an enum is a number on the wire
                found = "int32" if field.enum_type else _TYPES[field.type]
            assert (number, kind) == (field.number, found + "*" * field.is_repeated), (message, name)


@pytest.mark.parametrize("message", sorted(LEADING))
def test_no_field_that_leads_to_tensors_is_missing(message: str) -> None:
    descriptor = getattr(onnx, NAMES[message]).DESCRIPTOR
    wanted = {
        field.name
        for field in descriptor.fields
        if field.message_type is not None and OURS.get(field.message_type.name) in {*LEADING, "Tensor"}
    }
    assert wanted <= set(FIELDS[message])
    others = [field.message_type for field in descriptor.fields if field.message_type is not None]
    assert not [other.name for other in others if other.name not in OURS and _reaches_tensors(other, set())]


def test_element_types_are_those_of_onnx() -> None:
    assert {kind.name: kind.value for kind in DataType}.items() <= dict(onnx.TensorProto.DataType.items()).items()
    assert EXTERNAL == onnx.TensorProto.EXTERNAL


def _reaches_tensors(descriptor: Descriptor, seen: set[str]) -> bool:
    if descriptor.name == "TensorProto":
        return True
    seen.add(descriptor.name)
    inner = [field.message_type for field in descriptor.fields if field.message_type is not None]
    return any(_reaches_tensors(other, seen) for other in inner if other.name not in seen)


_TYPES = {1: "double", 2: "float", 3: "int64", 4: "uint64", 5: "int32", 9: "string", 12: "bytes"}
