"""Inputs and outputs of a graph as the manifest lists them."""

from __future__ import annotations

import onnx_ir as ir

from qe_edge.runtime.graph_specs import TensorSpec
from qe_edge.system.errors import ModelError

DTYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
}


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Name, type and shape of an input or output.

    Raises:
        ModelError: If its type or shape is unknown or unusual.

    Example:
        >>> value = ir.Value(name="hidden", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape(["batch", 64]))
        >>> spec = tensor_spec(value)
        >>> spec.name, spec.dtype, spec.shape
        ('hidden', 'float16', ('batch', 64))
    """
    if value.dtype not in DTYPES or value.shape is None:
        raise ModelError(
            f"The exported tensor '{value.name}' has no usable type.", "Use the versions in constraints.txt."
        )
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return TensorSpec.model_validate({"name": value.name, "dtype": DTYPES[value.dtype], "shape": shape})
