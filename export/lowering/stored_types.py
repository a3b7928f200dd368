"""Weights that a canonical graph stores in the checkpoint's type become float32, as all passes expect them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qe_edge.export.lowering.inline import add_when_written
from qe_edge.export.lowering.passes import InPlacePass, PassResult, remove_unused

STORED = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)


class WidenWeights(InPlacePass):
    """Replaces a Cast of an initializer to float32 by an initializer, which is converted when it is read.

    Example:
        >>> import torch
        >>> from qe_edge.export.plain_linears import PlainLinear, attach_plain_linears
        >>> text = '<ir_version: 10, opset_import: ["": 21, "qe_edge": 1]> g (float[1, 2, 4] x) => (float[1, 2, 3] y)'
        >>> model = ir.from_onnx_text(text + '{ y = qe_edge.QELinear <layer: string = "proj"> (x) }')
        >>> attach_plain_linears(model, {"proj": PlainLinear(torch.ones(3, 4, dtype=torch.bfloat16), None)})
        >>> WidenWeights()(model).modified, [node.op_type for node in model.graph]
        (True, ['MatMul'])
    """

    def call(self, model: ir.Model) -> PassResult:
        """Replace all of them."""
        widened = 0
        for node in list(model.graph):
            if (node.domain, node.op_type) != ("", "Cast") or node.outputs[0].dtype != ir.DataType.FLOAT:
                continue
            value = node.inputs[0]
            if value is None or value.dtype not in STORED or value.const_value is None:
                continue
            name, stored = node.outputs[0].name or f"{value.name}.float32", value.const_value
            wide = add_when_written(model.graph, name, _widened(stored), ir.DataType.FLOAT, stored.shape.numpy())
            node.outputs[0].replace_all_uses_with(wide)
            widened += 1
        if widened:
            remove_unused(model)
        return PassResult(model, modified=bool(widened))


def _widened(stored: ir.TensorProtocol) -> Callable[[], np.ndarray]:
    return lambda: stored.numpy().astype(np.float32)
