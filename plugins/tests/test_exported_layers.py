"""From checkpoint to PTX: layers of the exported demo, lowered as for an engine, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from emulator.plan import Buffers, Planner, Problem, Tactic
from emulator.ptx import PtxMachine
from emulator.session import DTYPE_CODE, WEIGHTS, aligned
from prepack.floats import from_bits, to_bits
from prepack.lower import lower
from tests.cases import LIMIT, relative_error
from tests.demo import layer, layer_inputs, packed_layer, session

# a bias; four experts; a channel scale and three times as many inputs
LAYERS = [
    ("visual", "model.visual.blocks.1.attn.qkv"),
    ("language", "model.language_model.layers.1.self_attn.o_proj"),
    ("language", "model.language_model.layers.3.mlp.down_proj"),
    ("w3/visual", "model.visual.blocks.1.attn.qkv"),
    ("w3/language", "model.language_model.layers.3.mlp.down_proj"),
]


def run_lowered(
    machine: PtxMachine, planner: Planner, model: onnx.ModelProto, x: NDArray[np.float32]
) -> tuple[NDArray[np.float32], list[str]]:
    """Launch what the plugin would for the one node of a lowered model; its tensors are the buffers, byte by byte."""
    (node,) = (each for each in model.graph.node if each.op_type == "QELinear")
    fields = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    known = {each[0] for each in Problem._fields_} & fields.keys()
    problem = Problem(
        dtype=DTYPE_CODE["f16"], M=len(x), N=fields["out_features"], K=fields["in_features"],
        **{name: fields[name] for name in known},
    )  # fmt: skip
    tensors = {tensor.name.rpartition(".")[2]: tensor for tensor in model.graph.initializer}
    machine.clear()
    keep: list[NDArray[Any]] = []

    def add(array: NDArray[Any], name: str, *, writable: bool = False) -> int:
        keep.append(aligned(array))
        return machine.add(keep[-1], name, writable=writable)

    weights = {name: numpy_helper.to_array(tensors[name]) for name in WEIGHTS if name in tensors}
    y = aligned(np.full((len(x), problem.N), 0x7E00, np.uint16))
    workspace = np.full(max(1, planner.workspace_bytes(problem)), 0xFF, np.uint8)
    buffers = Buffers(
        x=add(to_bits(x, "f16"), "x"),
        y=machine.add(y, "y", writable=True),
        workspace=add(workspace, "workspace", writable=True),
        **{name: add(array.view(np.uint8), name) for name, array in weights.items()},
    )
    errors = []
    for launch in planner.launches(problem, buffers, Tactic()):
        errors += machine.launch(launch, seed=1)
    return from_bits(y, "f16"), errors


@pytest.mark.parametrize("tokens", [1, 33, 70])
@pytest.mark.parametrize(("graph", "node"), LAYERS)
def test_ptx_and_onnx_runtime_agree(
    graph: str, node: str, tokens: int, planner: Planner, ptx_machine: PtxMachine
) -> None:
    model, x = layer(graph, node), layer_inputs(graph, node)
    x = np.resize(x, (tokens, x.shape[1]))  # some have fewer tokens, which come again then
    expected = session(model).run(None, {model.graph.input[0].name: x[None]})[0][0]
    lowered = lower(model)
    bits = {each.name: each.i for node in lowered.graph.node for each in node.attribute if each.name.endswith("_bits")}
    assert (bits["weight_bits"], bits["adapter_bits"]) == ((3, 4) if graph.startswith("w3") else (4, 8))
    y, errors = run_lowered(ptx_machine, planner, lowered, x)
    assert errors == []
    error = relative_error(y, expected.astype(np.float64))
    print(f"{node}, {tokens} tokens: {error:.2e}")
    assert error <= LIMIT["f16"]


@pytest.mark.parametrize(
    ("first", "others"), [("self_attn.q_proj", ["k_proj", "v_proj"]), ("mlp.gate_proj", ["up_proj"])]
)
def test_joined_siblings_and_onnx_runtime_agree(
    first: str, others: list[str], planner: Planner, ptx_machine: PtxMachine
) -> None:
    """Layers that are one node in the engine are apart in the exported graph."""
    block = "model.language_model.layers.2."
    nodes = [f"{block}{first}", *(f"{block}{first.partition('.')[0]}.{other}" for other in others)]
    x = layer_inputs("language", nodes[0])[:17]
    alone = (layer("language", node) for node in nodes)
    expected = np.concatenate([session(each).run(None, {each.graph.input[0].name: x[None]})[0][0] for each in alone], 1)
    y, errors = run_lowered(ptx_machine, planner, packed_layer("+".join([nodes[0], *others])), x)
    assert errors == []
    assert relative_error(y, expected.astype(np.float64)) <= LIMIT["f16"]


def test_the_comparison_notices_a_wrong_weight(planner: Planner, ptx_machine: PtxMachine) -> None:
    model, x = layer(*LAYERS[1]), layer_inputs(*LAYERS[1])[:4]
    expected = session(model).run(None, {model.graph.input[0].name: x[None]})[0][0]
    lowered = lower(model)
    columns = next(tensor for tensor in lowered.graph.initializer if tensor.name.endswith(".columns"))
    values = numpy_helper.to_array(columns).copy()
    values[0, 5] *= 1.1
    columns.CopyFrom(numpy_helper.from_array(values, columns.name))
    y, errors = run_lowered(ptx_machine, planner, lowered, x)
    assert errors == []
    assert relative_error(y, expected.astype(np.float64)) > LIMIT["f16"]
