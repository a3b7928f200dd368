"""The lowering for ONNX Runtime's CUDA provider; `tests/runtime/test_ort_cuda_session.py` runs what it gives."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from qe_edge.export.build import build_engines
from qe_edge.export.lowering.cuda import lower_for_cuda
from qe_edge.export.plugin_check import LayerForm, check_forms, choose_plugin
from qe_edge.export.targets import get_target
from qe_edge.runtime.plugin_library import FILE, OPERATOR_FILE
from qe_edge.system.errors import InputError, TargetError
from tests.conftest import Exported

NODES = {"visual": 4, "merger": 2, "language": 8}  # q/k/v and gate/up count once
ATTENTION = {"visual": "MultiHeadAttention", "merger": None, "language": "GroupQueryAttention"}


@pytest.mark.parametrize("graph", NODES)
def test_layers_are_nodes_of_the_operator_and_attention_stays(exported: Exported, graph: str) -> None:
    model = ir.load(exported.onnx / f"{graph}.onnx")
    precision = lower_for_cuda(model)
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["QELinear"] == NODES[graph]
    assert kinds["DequantizeLinear"] == 0
    assert not model.functions
    for node in model.graph:
        if node.op_type == "QELinear":
            y, scratch = node.outputs
            assert (node.inputs[0].dtype, y.dtype) == (ir.DataType.FLOAT16, ir.DataType.FLOAT16)  # type: ignore[union-attr]
            assert scratch.dtype == ir.DataType.UINT8
            assert not scratch.uses()
        if node.op_type == ATTENTION[graph]:
            assert {value.dtype for value in node.inputs[:3] if value} == {ir.DataType.FLOAT16}
    assert (ATTENTION[graph] in kinds) == (graph != "merger")
    assert [text.endswith("plugin") for text in precision.products.values()].count(True) == NODES[graph]
    for value in (*model.graph.inputs, *model.graph.outputs):
        cached = (value.name or "").startswith(("past_key_values.", "present."))
        assert value.dtype in (ir.DataType.FLOAT16 if cached else ir.DataType.FLOAT, ir.DataType.INT64)


def test_an_operator_without_a_kernel_is_named(exported: Exported) -> None:
    model = ir.load(exported.onnx / "merger.onnx")
    output = model.graph.outputs[0]
    det = ir.node("Acosh", [output], name="odd")
    det.outputs[0].name, det.outputs[0].type, det.outputs[0].shape = "odd.output", output.type, output.shape
    model.graph.append(det)
    model.graph.outputs[0] = det.outputs[0]
    with pytest.raises(TargetError, match="no CUDA kernel for the operator 'Acosh' of 'odd'"):
        lower_for_cuda(model)


def test_layers_run_on_the_kernels_alone(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'cuda' runs layers on the plugin's kernels alone") as caught:
        build_engines(exported.onnx, tmp_path / "cuda", "cuda")
    assert caught.value.remedy == "Add --plugin."
    assert not (tmp_path / "cuda").exists()


def test_the_libraries_are_asked_before_any_work(tmp_path: Path) -> None:
    library = tmp_path / FILE
    library.write_bytes(b"no library")
    with pytest.raises(TargetError, match=r"has no libqe_ort\.so beside it"):
        choose_plugin(["cuda"], library)
    library.with_name(OPERATOR_FILE).write_bytes(b"no library")
    with pytest.raises(TargetError, match="ONNX Runtime cannot load") as caught:
        check_forms([get_target("cuda")], library, [LayerForm("layer", 128, 128)])
    assert "build-plugin" in caught.value.remedy
