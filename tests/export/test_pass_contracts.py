"""Passes check what they require and what they ensure, and the error names the pass's condition."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from qe_edge.export.layers import layers_graph
from qe_edge.export.lowering.expand import ExpandGelu
from qe_edge.export.lowering.inline import InlineLayers
from qe_edge.export.lowering.passes import InPlacePass, linear_nodes
from qe_edge.export.lowering.plugin import PackLayers
from qe_edge.export.lowering.precision import ScaleQueries, ToHalf
from qe_edge.export.lowering.siblings import JoinSiblings
from tests.export.single_layers import Variant, make_layer


def canonical() -> ir.Model:
    return layers_graph({"first": make_layer(Variant()), "second": make_layer(Variant())})


def forget_types(model: ir.Model) -> None:
    for node in model.graph:
        node.outputs[0].type = None


@pytest.mark.parametrize("kind", [InlineLayers, JoinSiblings, PackLayers])
def test_a_computed_operand_is_refused(kind: type[InPlacePass]) -> None:
    model = canonical()
    scales = linear_nodes(model)[0].inputs[2]
    assert scales is not None
    computed = ir.node("Identity", [scales])
    model.graph.insert_before(linear_nodes(model)[0], computed)
    linear_nodes(model)[0].replace_input_with(2, computed.outputs[0])
    with pytest.raises(PreconditionError, match="Operands of layer 'first' are initializers"):
        kind()(model)


@pytest.mark.parametrize("kind", [ScaleQueries, ToHalf])
def test_results_without_types_are_refused(kind: type[InPlacePass]) -> None:
    model = canonical()
    forget_types(model)
    with pytest.raises(PreconditionError, match="Every result has a type"):
        kind()(model)


@pytest.mark.parametrize(
    ("kind", "promise"),
    [(InlineLayers, "No QELinear is left"), (PackLayers, "has the attribute 'layout_version'")],
)
def test_a_pass_that_does_nothing_breaks_its_promise(
    kind: type[InPlacePass], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, "call", lambda _self, model: PassResult(model, modified=False))
    with pytest.raises(PostconditionError, match=promise):
        kind()(canonical())


def test_gelu_that_is_left_breaks_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = canonical()
    model.graph.append(ir.node("Gelu", [model.graph.outputs[0]]))
    monkeypatch.setattr(ExpandGelu, "call", lambda _self, model: PassResult(model, modified=False))
    with pytest.raises(PostconditionError, match="No Gelu is left"):
        ExpandGelu()(model)


def test_contracts_hold_on_a_canonical_graph() -> None:
    inlined, packed = canonical(), canonical()
    assert InlineLayers()(inlined).modified
    assert PackLayers()(packed).modified
    assert len(linear_nodes(packed)) == 2
