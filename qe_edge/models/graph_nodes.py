"""Writing ONNX nodes one after the other, with numbers and arrays as constants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

OPSET = 21
Operand = ir.Value | np.ndarray | int | float | None


class Nodes:
    """A growing list of nodes.

    Example:
        >>> write = Nodes()
        >>> value = write("Add", 1, 2)
        >>> [node.op_type for node in write.nodes]
        ['Constant', 'Constant', 'Add']
    """

    def __init__(self, numbers: Iterator[int] | None = None) -> None:
        self._tape = tape.Tape()
        self._numbers = itertools.count() if numbers is None else numbers

    def inside(self) -> Nodes:
        """For the body of a node, whose names differ from those around it."""
        return Nodes(self._numbers)

    @property
    def nodes(self) -> list[ir.Node]:
        """Every node so far, in order."""
        return list(self._tape.nodes)

    def __call__(self, operator: str, *operands: Operand, **attributes: Any) -> ir.Value:  # noqa: ANN401 - ONNX's own
        """The output of a new node.

        Args:
            operator: Its type, of the standard domain.
            operands: Values; arrays become constants, an int an int64 one and a float a float64 one; None is left out.
            attributes: Its attributes.
        """
        inputs = [operand if isinstance(operand, ir.Value | None) else self.constant(operand) for operand in operands]
        return self._named(self._tape.op(operator, inputs, attributes or None))

    def constant(self, value: np.ndarray | int | float) -> ir.Value:
        """A constant; of a number a scalar."""
        return self._named(self._tape.op("Constant", [], {"value": ir.tensor(np.asarray(value))}))

    def _named(self, value: ir.Value) -> ir.Value:
        node = self._tape.nodes[-1]
        node.name = value.name = f"{node.op_type.lower()}_{next(self._numbers)}"
        return value

    def cast(self, value: Operand, dtype: ir.DataType) -> ir.Value:
        """Elements of another type."""
        return self("Cast", value, to=dtype.value)

    def joined(self, *numbers: Operand) -> ir.Value:
        """A vector int64 of scalars, for shapes."""
        if all(isinstance(number, int) for number in numbers):
            return self.constant(np.array(numbers, np.int64))
        first = np.array([0], np.int64)
        parts = [np.array([n], np.int64) if isinstance(n, int) else self("Unsqueeze", n, first) for n in numbers]
        return self("Concat", *parts, axis=0)

    def size(self, value: ir.Value, axis: int) -> ir.Value:
        """One size of a value, an int64 scalar."""
        return self("Squeeze", self("Shape", value, start=axis, end=axis + 1))

    def reshape(self, value: ir.Value, *sizes: Operand) -> ir.Value:
        """The value in another shape; a size may be -1."""
        return self("Reshape", value, self.joined(*sizes))

    def spread(self, value: ir.Value, *axes: int) -> ir.Value:
        """The value with new axes of size 1."""
        return self("Unsqueeze", value, np.array(axes, np.int64))

    def count(self, size: Operand) -> ir.Value:
        """int64 0, 1, ... up to but not `size`."""
        return self("Range", 0, size, 1)
