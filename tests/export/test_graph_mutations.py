"""Graphs of strangers, who can write hashes too: every damaged one is built or refused in a sentence that names it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qe_edge.export import build, targets
from qe_edge.export.build import build_engines
from qe_edge.export.contract import check_layers
from qe_edge.export.engine import EngineFacts, EngineRequest
from qe_edge.export.layers import layers_graph
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.runtime.graph_files import check_graph_file
from qe_edge.system.errors import ArtifactError, QEError, TargetError
from tests.conftest import Exported
from tests.export.graph_mutations import BYTES, MUTATIONS, mutate, nested, recursion
from tests.export.single_layers import Variant, make_layer
from tests.sealing import seal

GRAPHS = ("merger.onnx", "visual.onnx", "merger.onnx", "merger.onnx", "language.onnx")
KINDS = sorted(BYTES | MUTATIONS)  # each once; by hand 1,500 drawn ones were tried


@pytest.fixture
def folder(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, on a machine that builds engines of nothing: tests end where TensorRT begins."""

    def built(_request: EngineRequest) -> EngineFacts:
        return EngineFacts(version="1")

    monkeypatch.setattr(build, "build_engine", built)
    monkeypatch.setattr(build, "check_forms", lambda *_: None)
    monkeypatch.setattr(build, "_plugin_build", lambda _: None)
    monkeypatch.setattr(targets.Target, "build_problem", lambda _: None)
    return Path(shutil.copytree(exported.onnx, tmp_path / "onnx"))


def build_everywhere(folder: Path, out: Path, *, plugin: bool = False) -> list[QEError | None]:
    """What came of it in ONNX Runtime, and for TensorRT without or with the plugin."""
    found: list[QEError | None] = []
    for target, library in (("cpu", None), ("rtx", Path("libqe_plugin.so") if plugin else None)):
        try:
            build_engines(folder, out, target, plugin_library=library)
        except (ArtifactError, TargetError) as error:
            found.append(error)
        else:
            found.append(None)
            shutil.rmtree(out)
        assert not out.exists()
    return found


def test_mutated_graphs_are_built_or_refused(exported: Exported, folder: Path, tmp_path: Path) -> None:
    refused = 0
    for seed, kind in enumerate(KINDS):
        name = GRAPHS[seed % len(GRAPHS)]
        mutate(exported.onnx / name, folder / name, seed, kind)
        seal(folder)
        for error in build_everywhere(folder, tmp_path / "out", plugin=seed % 2 == 0):
            if error is not None:
                refused += 1
                assert name in error.problem, (kind, error)
                assert error.remedy
                assert len(error.problem) < 700
        shutil.copyfile(exported.onnx / name, folder / name)
    assert refused > 1.2 * len(KINDS)


def edit(folder: Path, name: str, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(folder / name, load_external_data=False)
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    seal(folder)


def weight(model: onnx.ModelProto, ending: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(ending))


def layer(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "QELinear")


def put(tensor: TensorProto, key: str, value: str) -> None:
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def set_attribute(node: onnx.NodeProto, name: str, value: object) -> None:
    for index, attribute in enumerate(node.attribute):
        if attribute.name == name:
            node.attribute[index].CopyFrom(helper.make_attribute(name, value))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: put(weight(m, ".qweight"), "location", "../visual.onnx.data"), "lies in '../visual.onnx.data', and"),
        (lambda m: put(weight(m, ".qweight"), "location", "/etc/hostname"), "lies in '/etc/hostname', and only"),
        (lambda m: put(weight(m, ".qweight"), "location", "w" * 9000), "lies in '" + "w" * 199 + "…', and only"),
        (lambda m: put(weight(m, ".qweight"), "location", "merger.onnx.data"), "lies in 'merger.onnx.data', and only"),
        (lambda m: put(weight(m, ".qweight"), "location", "embedding.safetensors"), "and only 'visual.onnx.data' in"),
        (lambda m: put(weight(m, ".qweight"), "offset", "-4096"), "has the offset '-4096'"),
        (lambda m: put(weight(m, ".qweight"), "offset", "9" * 17), "goes beyond the end of 'visual.onnx.data'"),
        (lambda m: put(weight(m, ".qweight"), "offset", "\u00b2"), "has the offset"),
        (lambda m: put(weight(m, ".qweight"), "length", "12"), "announces 12 bytes outside the graph"),
        (lambda m: put(weight(m, "fc2.qweight"), "offset", "64"), "overlap in 'visual.onnx.data'"),
        (lambda m: weight(m, ".qweight").external_data.add(key="offset", value="0"), "no clear place"),
        (lambda m: weight(m, ".qweight").dims.__setitem__(0, 2**62), "announces"),
        (lambda m: weight(m, ".qweight").dims.__setitem__(0, -1), "has the shape [-1"),
        (lambda m: setattr(weight(m, ".qweight"), "data_type", 98), "unknown type 98"),
        (lambda m: m.graph.initializer.append(TensorProto(name="x", data_type=1, dims=[2**40])), "has 0 values and"),
    ],
)
def test_weights_are_read_beside_their_graph_and_nowhere_else(
    folder: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], object], words: str
) -> None:
    edit(folder, "visual.onnx", change)
    for error in build_everywhere(folder, tmp_path / "out"):
        assert isinstance(error, ArtifactError)
        assert words in error.problem
        assert error.remedy == "Export the model again."


def test_tensors_of_functions_and_inner_graphs_are_looked_at_too(folder: Path, tmp_path: Path) -> None:
    inner = TensorProto(name="hidden", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    inner.external_data.add(key="location", value="../../secret")

    def in_a_branch(model: onnx.ModelProto) -> None:
        branch = helper.make_graph([], "branch", [], [], [inner])
        model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))

    def in_a_function(model: onnx.ModelProto) -> None:
        model.functions[0].node.append(helper.make_node("Constant", [], ["y"], value=inner))

    for change in (in_a_branch, in_a_function):
        edit(folder, "merger.onnx", change)
        with pytest.raises(ArtifactError, match=r"tensor 'hidden' .*secret"):
            check_graph_file(folder, "merger.onnx")


def test_weights_that_are_a_link(folder: Path, tmp_path: Path) -> None:
    data = folder / "merger.onnx.data"
    shutil.move(data, tmp_path / "secret")
    data.symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="is a link that points outside") as caught:
        check_graph_file(folder, "merger.onnx")
    assert "the file itself" in caught.value.remedy
    data.unlink()
    with pytest.raises(ArtifactError, match=r"'merger\.onnx\.data', which is missing"):
        check_graph_file(folder, "merger.onnx")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: set_attribute(layer(m), "act_bits", 1.5), "attribute 'act_bits' is missing or no whole number"),
        (lambda m: set_attribute(layer(m), "num_experts", 2**40), "attribute 'num_experts' is 1099511627776"),
        (lambda m: set_attribute(layer(m), "group_size", 0), "no multiple of its group size 0"),
        (lambda m: set_attribute(layer(m), "group_size", 8), "'scales' has the shape"),
        (lambda m: set_attribute(layer(m), "rank_shared", 3), "'down' has the shape"),
        (lambda m: layer(m).input.__setitem__(6, ""), "only a part of its low-rank correction"),
        (lambda m: setattr(layer(m), "name", ""), "it has no name"),
        (lambda m: setattr(m.graph.node[0], "name", layer(m).name), "Two nodes of"),
        (lambda m: m.graph.output[0].type.tensor_type.shape.dim[0].ClearField("dim_param"), "outputs of"),
    ],
)
def test_layers_that_contradict_themselves(
    folder: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], object], words: str
) -> None:
    edit(folder, "visual.onnx", change)
    with pytest.raises(ArtifactError) as caught:
        build_engines(folder, tmp_path / "out", "rtx")
    assert words in caught.value.problem
    assert "visual.onnx" in caught.value.problem
    assert caught.value.remedy == "Export the model again."


@pytest.mark.parametrize(("other", "words"), [(0, "'qweight' is no initializer"), (5, "'qweight' is INT8")])
def test_a_weight_that_is_none(folder: Path, other: int, words: str) -> None:
    """ONNX's own check stops these too; the contract must not need it."""
    edit(folder, "visual.onnx", lambda m: layer(m).input.__setitem__(1, layer(m).input[other]))
    with pytest.raises(ArtifactError, match=words):
        check_layers(ir.load(folder / "visual.onnx"), folder / "visual.onnx")


@pytest.mark.parametrize("change", [recursion, nested])
def test_graphs_without_an_end(folder: Path, tmp_path: Path, change: Callable[..., None]) -> None:
    edit(folder, "language.onnx", lambda model: change(model, random.Random(0)))
    assert all(error is not None for error in build_everywhere(folder, tmp_path / "out"))


def test_a_lowering_that_fails_names_the_graph(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_model: ir.Model, *, plugin: bool, capacity: int | None) -> None:
        raise KeyError("value")

    monkeypatch.setattr(build, "lower_for_tensorrt", fail)
    with pytest.raises(TargetError, match=r"visual\.onnx' cannot be lowered for tensorrt_rtx: 'value'\.") as caught:
        build_engines(folder, tmp_path / "out", "rtx")
    assert "target 'cpu'" in caught.value.remedy


def test_shapes_that_cannot_be_inferred_are_not_passed_over(capfd: pytest.CaptureFixture[str]) -> None:
    model = layers_graph({"layer": make_layer(Variant())})
    model.graph.inputs[0].shape = ir.Shape([1, 2, 63])
    with pytest.raises(ValueError, match=r"[Ii]nfer"):
        lower_for_tensorrt(model)
    assert "Traceback" not in capfd.readouterr().err
