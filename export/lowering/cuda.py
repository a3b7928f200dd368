"""The lowering for ONNX Runtime's CUDA provider: float16, layers as nodes of `libqe_ort.so`, attention as it is.

Not yet run on a GPU. The same graph with layers in standard operators runs on the CPU provider, where tests compare it.
"""

from __future__ import annotations

import onnx_ir as ir

from qe_edge.export.cached_attention import cached_attention_nodes, expand_cached_attention, writes
from qe_edge.export.lowering.half import finish_in_half
from qe_edge.export.lowering.inline import inline_layers
from qe_edge.export.lowering.plugin import is_packed, pack_layers
from qe_edge.export.lowering.stored_types import WidenWeights
from qe_edge.models import cached_attention, linear_attention, picture_attention
from qe_edge.runtime.engine_info import Precision
from qe_edge.system.errors import TargetError

FLOATS = (ir.DataType.FLOAT16, ir.DataType.FLOAT)
ATTENTION = tuple((kind.DOMAIN, kind.NAME) for kind in (cached_attention, linear_attention, picture_attention))
# Standard operators whose kernels of the CUDA provider take float16 and float32, of those that graphs may have:
# docs/OperatorKernels.md of ONNX Runtime. Range has no float16.
KERNELS = frozenset((
    "Abs", "Add", "ArgMax", "ArgMin", "AveragePool", "Cast", "Ceil", "Clip", "Concat", "Constant",
    "ConstantOfShape", "Conv", "Cos", "CumSum", "DequantizeLinear", "Div", "Einsum", "Equal", "Erf", "Exp",
    "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool",
    "Greater", "GreaterOrEqual", "Identity", "IsNaN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual",
    "Log", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg", "Pad", "Pow", "Reciprocal", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "Round",
    "ScatterElements", "ScatterND", "Shape", "Sigmoid", "Sign", "Sin", "Slice", "Softmax", "Softplus", "Split", "Sqrt",
    "Squeeze", "Sub", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
))  # fmt: skip


def lower_for_cuda(model: ir.Model, *, plugin: bool = True) -> Precision:
    """Lower a canonical graph in place; returns what computes in which precision.

    `GroupQueryAttention`, `MultiHeadAttention` and `LinearAttention` stay: the provider has kernels for them. Those of
    the first write the cache in place, and the last computes in float32, with its states. Nodes that read the keys and
    values of an earlier layer become standard operators: whether the kernel takes no new ones has not been tried on a
    GPU.

    Args:
        model: A canonical graph.
        plugin: Whether layers become nodes of the operator instead of standard operators, which any provider runs.

    Raises:
        TargetError: If the kernels cannot run a layer, or the provider has none for an operator.
        ValueError: If types and shapes do not fit together.

    Example:
        >>> import qe_edge, torch
        >>> from qe_edge.export.layers import layers_graph
        >>> layer = qe_edge.quantize_linear(torch.ones(32, 64), torch.ones(2, 64), qe_edge.make_recipe(method="rtn"))
        >>> model = layers_graph({"mlp.up": layer})
        >>> lower_for_cuda(model).products
        {'mlp.up': 'int4 weights, plugin'}
    """
    WidenWeights()(model)
    expand_cached_attention(model, [node for node in cached_attention_nodes(model) if not writes(node)])
    if plugin:
        pack_layers(model, scratch=True)
    else:
        inline_layers(model)
    precision = finish_in_half(model)
    for node in model.graph:
        _check_kernel(node)
    return precision


def _check_kernel(node: ir.Node) -> None:
    """Refuse a node that computes with floats on the CPU; ONNX Runtime may do so with indices.

    Raises:
        TargetError: If it is one.
    """
    known = (
        node.op_type in KERNELS if node.domain == "" else is_packed(node) or (node.domain, node.op_type) in ATTENTION
    )
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if not known and any(value.dtype in FLOATS for value in values):
        raise TargetError(
            f"ONNX Runtime has no CUDA kernel for the operator '{node.op_type}' of '{node.name}'.",
            "Build for the target 'tensorrt', 'rtx' or 'cpu'.",
        )
