"""Readable names: nodes and weights are called after the module of the original model that they come from."""

from __future__ import annotations

import ast

import onnx_ir as ir
from torch import nn

from qe_edge.export.op import DOMAIN

SCOPES = "pkg.torch.onnx.name_scopes"  # torch's exporter notes here the modules around every node


def name_nodes(model: ir.Model, wrapper: nn.Module, original: nn.Module) -> None:
    """Rename nodes to `<module>/<operation>` and weights to the model's own names; drops torch's metadata.

    Linear layers have their names already: they were attached to bare nodes.

    Args:
        model: A traced graph; changed in place.
        wrapper: The module that was traced.
        original: The model whose names are wanted.

    Example:
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
        >>> model = ir.from_onnx_text(text)
        >>> model.graph[0].name = "node_Abs_17"
        >>> name_nodes(model, nn.Module(), nn.Module())
        >>> model.graph[0].name
        'Abs_17'
    """
    names = {id(module): name for name, module in original.named_modules()}
    modules = {path: names.get(id(module), "") for path, module in wrapper.named_modules()}
    for node in model.graph:
        if node.domain == DOMAIN:
            continue
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        path = next((modules[scope] for scope in reversed(scopes[:-1]) if scope in modules), "")
        label = (node.name or node.op_type).removeprefix("node_")
        node.name = f"{path}/{label}".lstrip("/")
    _name_weights(model, modules)
    _drop_metadata(model)


def _name_weights(model: ir.Model, modules: dict[str, str]) -> None:
    """Initializers that carry a name inside the wrapper get the one inside the model."""
    for value in list(model.graph.initializers.values()):
        path, _, leaf = (value.name or "").rpartition(".")
        if modules.get(path):
            value.name = f"{modules[path]}.{leaf}"


def _drop_metadata(model: ir.Model) -> None:
    """The exporter notes stack traces, which hold paths of the exporting machine."""
    ir.passes.common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for values in (model.graph.inputs, model.graph.outputs, model.graph.initializers.values()):
        for value in values:
            value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
