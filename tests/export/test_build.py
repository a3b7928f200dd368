from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qe_edge.export import targets
from qe_edge.export.build import build_engines
from qe_edge.export.engine import EngineRequest, build_engine
from qe_edge.export.layers import layers_graph
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.targets import TARGETS, get_target
from qe_edge.models.family import Sample
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.manifest import read_manifest
from qe_edge.system.child_process import isolated_code, safe_environment
from qe_edge.system.errors import ArtifactError, ResourceError, TargetError, UnknownNameError
from tests.conftest import Exported
from tests.export.single_layers import Variant, make_layer
from tests.sealing import seal

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


def test_cpu_engines_compute_what_the_graphs_do(exported: Exported, tmp_path: Path, held_out: list[Sample]) -> None:
    folder = build_engines(exported.onnx, tmp_path / "engines" / "cpu", "cpu")
    assert folder == tmp_path / "engines" / "cpu"
    names = {path.name for path in exported.onnx.iterdir()} | {"engine.json"}
    assert {path.name for path in folder.iterdir()} == names
    info = read_engine_info(folder)
    assert info is not None
    assert (info.target, info.backend) == ("cpu", "onnxruntime")
    assert info.graphs["language"].size > 100_000
    built, graphs = (VisionLanguageEngine.load(path, threads=1) for path in (folder, exported.onnx))
    encoded = graphs.encode(held_out[:2])
    valid = encoded.attention_mask.astype(bool)
    wanted = graphs.logits(encoded)[valid]
    # the order of a sum decides between two codes of an activation now and then
    assert np.median(np.abs(built.logits(encoded)[valid] - wanted).max(-1)) < 1e-4 * np.abs(wanted).max()


@needs_rtx
@pytest.mark.slow
def test_rtx_engines(exported: Exported, tmp_path: Path) -> None:
    folder = build_engines(exported.onnx, tmp_path / "rtx", "rtx")
    info = read_engine_info(folder)
    assert info is not None
    assert info.capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")
    manifest = read_manifest(folder)
    for name in ("visual", "merger", "language"):
        size = (folder / f"{name}.engine").stat().st_size
        build = info.graphs[name]
        assert size == build.size > 100_000
        assert build.seconds > 0
        assert build.precision is not None
        products = list(build.precision.products.values())
        assert products.count("int4 weights, float16") == {"visual": 4, "merger": 2, "language": 14}[name]
        assert manifest.graphs[name].file == f"{name}.engine"
    types = {spec.name: spec.dtype for spec in manifest.graphs["language"].inputs}
    assert (types["inputs_embeds"], types["past_key_values.0.key"]) == ("float32", "float16")
    remaining = [name for path in folder.iterdir() if (name := path.name).startswith(".") or ".onnx" in name]
    assert remaining == ["preprocess.onnx"]  # which runs on the CPU


@needs_rtx
def test_a_lowered_layer_keeps_its_int4_weights_in_the_engine(tmp_path: Path) -> None:
    """The engine's size tells: float16 weights would be four times as large."""
    wide = Variant(in_features=1024, out_features=4096, symmetric=False, group_size=128, act_bits=0, factors="none")
    model = layers_graph({"layer": make_layer(wide)})
    lower_for_tensorrt(model)
    ir.save(model, tmp_path / "layer.onnx", external_data="layer.onnx.data")
    facts = build_engine(request(tmp_path, "tensorrt_rtx", {"layer.x": ((1, 1, 1024), (1, 16, 1024), (4, 512, 1024))}))
    assert facts.errors == []
    assert 1024 * 4096 / 2 < facts.size < 1.3 * 1024 * 4096 / 2


def request(folder: Path, backend: str, shapes: dict[str, object]) -> EngineRequest:
    return EngineRequest(
        backend=backend,  # type: ignore[arg-type]
        onnx=folder / "layer.onnx",
        engine=folder / "layer.engine",
        facts=folder / "facts.json",
        profiles={"default": shapes},  # type: ignore[dict-item]
        capabilities=((8, 6),) if backend == "tensorrt_rtx" else (),
    )


@needs_rtx
def test_what_tensorrt_refuses(tmp_path: Path) -> None:
    (tmp_path / "layer.onnx").write_bytes(b"no graph")
    with pytest.raises(TargetError, match="tensorrt_rtx refuses the graph 'layer'"):
        build_engine(request(tmp_path, "tensorrt_rtx", {}))


@needs_rtx
def test_a_library_that_is_no_plugin(tmp_path: Path) -> None:
    library = tmp_path / "libqe_plugin.so"
    library.write_text("no library", encoding="utf-8")
    with pytest.raises(TargetError, match="cannot load the plugin library '") as caught:
        build_engine(replace(request(tmp_path, "tensorrt_rtx", {}), plugin_library=library))
    assert "qe-edge build-plugin" in caught.value.remedy


@needs_rtx
def test_profiles_that_contradict_themselves(tmp_path: Path) -> None:
    model = layers_graph({"layer": make_layer(Variant())})
    lower_for_tensorrt(model)
    ir.save(model, tmp_path / "layer.onnx")
    with pytest.raises(TargetError, match="tensorrt_rtx refuses the graph 'layer'"):
        build_engine(request(tmp_path, "tensorrt_rtx", {"layer.x": ((1, 9, 64), (1, 4, 64), (1, 2, 64))}))


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("import os; os.abort()", TargetError, "crashed while building 'layer'"),
        ("import os; os.kill(os.getpid(), 9)", ResourceError, "was killed"),
        ("raise RuntimeError('no driver')", TargetError, "no driver"),
        ("import os; os._exit(0)", TargetError, "reported nothing"),
    ],
)
def test_a_builder_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, error: type[Exception], words: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(error, match=words):
        build_engine(request(tmp_path, "tensorrt", {}))


def test_a_failed_build_leaves_nothing(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(_request: EngineRequest) -> None:
        raise TargetError("It crashed.", "Try again.")

    monkeypatch.setattr("qe_edge.export.build.build_engine", crash)
    monkeypatch.setattr(targets.Target, "build_problem", lambda _target: None)
    with pytest.raises(TargetError, match=re.escape("It crashed.")):
        build_engines(exported.onnx, tmp_path / "engines" / "new" / "rtx", "rtx")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "engines").mkdir()  # what was there before stays, even if it is empty
    with pytest.raises(TargetError, match=re.escape("It crashed.")):
        build_engines(exported.onnx, tmp_path / "engines" / "new" / "rtx", "rtx")
    assert [path.name for path in tmp_path.rglob("*")] == ["engines"]


OPENED = """
import sys
from pathlib import Path
from qe_edge.runtime.graph_specs import GraphFile
from qe_edge.runtime.sessions import check_opens, ort_errors
ort_errors()  # imports ONNX Runtime
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
check_opens(Path(sys.argv[1]), GraphFile.model_validate_json(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_built_graph_is_opened_without_its_weights(tmp_path: Path) -> None:
    """128 MiB of bfloat16, which ONNX Runtime would widen, and 64 MiB of float32, which it would pack."""
    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[n, 4096] x) => (float[n, 1024] y) {
            widened = Cast <to = 1> (w)
            hidden = MatMul (x, widened)
            y = MatMul (hidden, v)
        }"""
    model, offset = onnx.parser.parse_model(text), 0
    for name, kind, shape in (("w", "BFLOAT16", (4096, 16384)), ("v", "FLOAT", (16384, 1024))):
        data_type = onnx.TensorProto.DataType.Value(kind)
        weight = model.graph.initializer.add(name=name, data_type=data_type, dims=shape)
        weight.data_location = onnx.TensorProto.EXTERNAL
        size = shape[0] * shape[1] * (2 if kind == "BFLOAT16" else 4)
        for key, value in {"location": "g.onnx.data", "offset": offset, "length": size}.items():
            weight.external_data.add(key=key, value=str(value))
        offset += size
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "g.onnx.data").open("wb") as file:
        file.truncate(offset)
    x, y = ({"name": name, "dtype": "float32", "shape": ["n", width]} for name, width in (("x", 4096), ("y", 1024)))
    entry = json.dumps({"file": "g.onnx", "inputs": [x], "outputs": [y]})
    command = [*isolated_code(OPENED), str(tmp_path), entry]
    ran = subprocess.run(command, capture_output=True, check=True, text=True, env=safe_environment())
    assert int(ran.stdout) < 32 * 1024


@pytest.mark.parametrize("engine", [False, True])
def test_engines_cannot_be_built_from_engines(exported: Exported, tmp_path: Path, engine: bool) -> None:
    folder = build_engines(exported.onnx, tmp_path / "engines", "cpu")
    if engine:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, entry in manifest["graphs"].items():
            entry["file"] = f"{name}.engine"
            (folder / entry["file"]).touch()
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        seal(folder)
    with pytest.raises(ArtifactError, match="holds engines"):
        build_engines(folder, tmp_path / "out", "cpu")


def test_unknown_targets() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'jetson-orin'"):
        get_target("jetson-orin-nano")


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("rtx", r"pip install 'qe-edge\[rtx\]'"),
        ("tensorrt", r"pip install 'qe-edge\[tensorrt\]'"),
        ("jetson-orin", "JetPack 6.2"),
        ("jetson-thor", "JetPack 7.0"),
    ],
)
def test_a_missing_library(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, remedy: str
) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda _module: None)
    with pytest.raises(TargetError, match=remedy):
        build_engines(exported.onnx, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_a_target_for_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "find_spec", lambda _module: object())
    monkeypatch.setattr(targets, "compute_capability", lambda: (8, 9))
    with pytest.raises(TargetError, match=r"for sm_87, and this machine's GPU is sm_89"):
        TARGETS["jetson-orin"].check()
    TARGETS["tensorrt"].check()
    monkeypatch.setattr(targets, "compute_capability", lambda: None)
    with pytest.raises(TargetError, match="has none"):
        TARGETS["tensorrt"].check()
    assert TARGETS["rtx"].run_problem() is not None
    assert TARGETS["cpu"].run_problem() is None
