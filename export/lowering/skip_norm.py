"""Joins a residual's addition and the RMS norm that follows it to one node, as ONNX Runtime computes them."""

from __future__ import annotations

import onnx_ir as ir

from qe_edge.export.lowering.passes import InPlacePass, PassResult, ensure, remove_unused
from qe_edge.export.lowering.patterns import maker, number_of
from qe_edge.models.cached_attention import DOMAIN, VERSION

NAME = "SkipSimplifiedLayerNormalization"


class FuseSkipNorm(InPlacePass):
    """Replaces an `Add` and the RMS norm of its sum by one node. Ensures that no such norm is left.

    Attributes:
        fused: How many.

    Example:
        >>> head = '<ir_version: 10, opset_import: ["": 21]>'
        >>> sizes = "g (float[1, 2, 4] a, float[1, 2, 4] b) => (float[1, 2, 4] y)"
        >>> constants = "<float[4] w = {1, 1, 1, 1}, float e = {1e-6}, float two = {2}, int64[1] last = {-1}>"
        >>> body = "x = Add(a, b) p = Pow(x, two) m = ReduceMean(p, last) v = Add(m, e) r = Sqrt(v) d = Div(x, r)"
        >>> model = ir.from_onnx_text(f"{head} {sizes} {constants} {{ {body} y = Mul(d, w) }}")
        >>> FuseSkipNorm()(model).modified
        True
        >>> [node.op_type for node in model.graph]
        ['SkipSimplifiedLayerNormalization']
    """

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def call(self, model: ir.Model) -> PassResult:
        """Replace all of them."""
        for node in list(model.graph):
            found = _norm(node)
            if found is not None:
                _replace(model.graph, node, *found)
                self.fused += 1
        if self.fused:
            model.opset_imports[DOMAIN] = VERSION
        remove_unused(model)
        return PassResult(model, modified=bool(self.fused))

    def ensures(self, model: ir.Model) -> None:
        """No RMS norm of a sum is left."""
        ensure(not any(map(_norm, model.graph)), "No RMS norm of a sum is left.")


def _norm(node: ir.Node) -> tuple[ir.Node, ir.Value, float] | None:
    """The addition, the weight and the epsilon, where a node is the last one of an RMS norm of a sum.

    Its form is `(a + b) / sqrt(mean((a + b) ** 2, -1) + epsilon) * weight`.
    """
    if (node.domain, node.op_type) != ("", "Mul"):
        return None
    for weight, quotient in (node.inputs, node.inputs[::-1]):
        divided = maker(quotient, "Div")
        root = None if divided is None else maker(divided.inputs[1], "Sqrt")
        moved = None if root is None else maker(root.inputs[0], "Add")
        if divided is None or moved is None or weight is None or weight.const_value is None:
            continue
        added, epsilon = maker(divided.inputs[0], "Add"), number_of(moved.inputs[1])
        if added is None or epsilon is None or not _is_mean_square(moved.inputs[0], divided.inputs[0]):
            continue
        if weight.const_value.shape.rank() == 1 and _same_shape(*added.inputs):
            return added, weight, epsilon
    return None


def _is_mean_square(value: ir.Value | None, x: ir.Value | None) -> bool:
    """Whether a value is the mean of x squared along the last axis, with that axis kept."""
    mean = maker(value, "ReduceMean")
    if mean is None or len(mean.inputs) < 2 or number_of(mean.inputs[1]) != -1:
        return False
    power = maker(mean.inputs[0], "Pow")
    kept = mean.attributes.get("keepdims")
    return (
        power is not None and power.inputs[0] is x and number_of(power.inputs[1]) == 2
        and (kept is None or kept.as_int() == 1)
    )  # fmt: skip


def _same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether two values `[batch, sequence, width]` have the same shape, as far as it is known."""
    shapes = [None if value is None or value.const_value is not None else value.shape for value in (first, second)]
    if shapes[0] is None or shapes[1] is None:
        return False
    return len(shapes[0]) == len(shapes[1]) == 3 and shapes[0][2] == shapes[1][2]


def _replace(graph: ir.Graph, node: ir.Node, added: ir.Node, weight: ir.Value, epsilon: float) -> None:
    total = added.outputs[0]
    outputs = [ir.Value(name=f"{node.name}.skip{number}") for number in range(4)]
    for output, like in ((outputs[0], node.outputs[0]), (outputs[3], total)):
        output.type, output.shape = like.type, like.shape
    outputs[1].name = outputs[2].name = ""  # the mean and the variance of training
    fused = ir.node(
        NAME,
        [*added.inputs, weight],
        {"epsilon": epsilon},
        domain=DOMAIN,
        outputs=outputs,
        name=f"{node.name}/skip",
    )
    graph.insert_after(added, fused)
    ir.convenience.replace_nodes_and_values(
        graph, fused, [node, added], [], [node.outputs[0], total], [outputs[0], outputs[3]]
    )
