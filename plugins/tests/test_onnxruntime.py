"""`libqe_ort.so`, the operator for ONNX Runtime, where there is no GPU.

The library that ships is loaded into ONNX Runtime, which has no CUDA provider here. The same sources, compiled for the
CPU provider, run whole graphs: with the kernels on the source emulator, which has to give the reference's values, and
under AddressSanitizer and UBSan with nodes that are wrong.

Not yet run on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from emulator.build import BUILD, ROOT, source_emulator
from prepack.floats import to_bits
from prepack.lower import lower
from prepack.reference import qe_linear
from tests.cases import LIMIT, Mode, random_layer, random_tokens, relative_error
from tests.modes import MODES
from tests.onnx_models import canonical_model

LAYER = ("attributes", "plan", "signature")
OPERATOR = ("kernels", "operator", "register")
COMPILER = [os.environ.get("CXX", "g++"), "-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
FOR_CPU = '-DQE_ORT_PROVIDER="CPUExecutionProvider"'
HOSTILE = 150  # models
ODD = [0, 1, -1, 2, 3, 7, 8, 64, 128, 129, 4096, 2**31 - 1, -(2**31), 2**40]
HALF_MODES = [mode for mode in MODES if mode.dtype == "f16"]


def sources(folder: str, names: tuple[str, ...]) -> list[str]:
    return [str(ROOT / folder / f"{name}.cpp") for name in names]


def compile_for_cpu(folder: Path, *options: str) -> Path:
    """`libqe_ort.so` for the CPU provider, and `libqe_plugin.so` of the host's memory, in a folder."""
    layer = sources("host", LAYER)
    headers = ["-isystem", str(ROOT / "third_party/onnxruntime")]
    emulated = [str(ROOT / "tests/emulated_layers.cpp"), *layer, "-ldl"]
    subprocess.run([*COMPILER, *options, *emulated, "-o", str(folder / "libqe_plugin.so")], check=True)
    operator = [*sources("ort", OPERATOR), *layer, *headers, FOR_CPU, "-ldl"]
    subprocess.run([*COMPILER, *options, *operator, "-o", str(folder / "libqe_ort.so")], check=True)
    return folder / "libqe_ort.so"


def packed_model(modes: list[Mode], features: list[int]) -> onnx.ModelProto:
    """A chain of packed nodes, each with its output of scratch memory."""
    model = lower(canonical_model(modes, features))
    for node in model.graph.node:
        node.output.append(f"{node.name}.workspace")
    return model


def open_session(model: onnx.ModelProto, library: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_cpu(tmp_path_factory.mktemp("emulated"), f'-DQE_EMULATOR="{source_emulator()}"')


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_cpu(tmp_path_factory.mktemp("sanitized"), *SANITIZERS)


@pytest.mark.parametrize("mode", HALF_MODES, ids=lambda mode: mode.name)
def test_gives_the_values_of_the_reference(mode: Mode, emulated: Path) -> None:
    """One token, as in decode, and 17."""
    session = open_session(packed_model([mode], [256, 136]), emulated)
    linear = random_layer(mode, 256, 136)
    for tokens in (1, 17):
        x = random_tokens(mode, tokens, 256)
        y = session.run(None, {"h0": to_bits(x, "f16").view(np.float16)[None]})[0]
        assert y.shape == (1, tokens, 136)
        assert relative_error(y[0].astype(np.float32), qe_linear(linear, x, "f16")) <= LIMIT["f16"]


def test_nodes_have_memory_of_their_own(emulated: Path) -> None:
    """A chain of layers, whose scratch memory ONNX Runtime plans; every node opens one layer, and closes it."""
    kept = ctypes.CDLL(str(emulated.with_name("libqe_plugin.so")))
    kept.QeOpenLayers.restype = kept.QeChecks.restype = ctypes.c_int64
    before = kept.QeOpenLayers(), kept.QeChecks()
    modes, features = [HALF_MODES[0], HALF_MODES[3], HALF_MODES[4]], [256, 128, 256, 136]
    session = open_session(packed_model(modes, features), emulated)
    x = random_tokens(modes[0], 6, 256)
    expected = x
    for number, mode in enumerate(modes):
        linear = random_layer(mode, features[number], features[number + 1], seed=number)
        expected = qe_linear(linear, expected.astype(np.float32), "f16").astype(np.float16).astype(np.float32)
    for _ in range(2):
        y = session.run(None, {"h0": x.astype(np.float16).reshape(2, 3, 256)})[0]
        assert relative_error(y.reshape(6, 136).astype(np.float32), expected.astype(np.float64)) < 1e-2
    assert (kept.QeOpenLayers() - before[0], kept.QeChecks() - before[1]) == (3, 3)
    assert session.run(None, {"h0": np.zeros((0, 3, 256), np.float16)})[0].shape == (0, 3, 136)
    del session
    assert kept.QeOpenLayers() == before[0]


@pytest.mark.parametrize("graph", ["merger", "language"])
def test_the_demos_graphs_compute_what_the_exported_ones_do(graph: str, emulated: Path) -> None:
    """As `qe-edge build --target cuda` wrote them: prompts of 7 tokens into a cache that is written in place."""
    built, exported = (BUILD / f"demo/{folder}/{graph}.onnx" for folder in ("cuda", "onnx"))
    assert built.exists(), f"{built} is missing. Run plugins/ladder.sh, which builds it."
    outputs = []
    for path in (built, exported):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if path == built:  # whose nodes are the operator's; the others are those of a function
            options.register_custom_ops_library(str(emulated))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        rng, sizes = np.random.default_rng(0), {"sequence": 7, "total": 7, "capacity": 16}
        feeds = {}
        for value in session.get_inputs():
            shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in value.shape]
            cached, half = value.name.startswith("past_key_values."), value.type == "tensor(float16)"
            real = np.zeros(shape) if cached else rng.standard_normal(shape)
            feeds[value.name] = real.astype(np.float16 if half else np.float32)
            if value.type == "tensor(int64)":
                feeds[value.name] = np.ones(shape, np.int64) if value.name == "attention_mask" else np.full(shape, 3)
        outputs.append(session.run(None, feeds)[0])
    # some activations fall on the other side of a rounding step
    assert relative_error(outputs[0].astype(np.float32), outputs[1].astype(np.float64)) < 3e-2


def set_attribute(name: str, value: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        (found,) = (each for each in model.graph.node[0].attribute if each.name == name)
        found.i = value

    return change


def drop_attribute(model: onnx.ModelProto) -> None:
    attributes = model.graph.node[0].attribute
    del attributes[[each.name for each in attributes].index("rank_shared")]


def drop_weight(model: onnx.ModelProto) -> None:
    del model.graph.node[0].input[-1]


def drop_workspace(model: onnx.ModelProto) -> None:
    del model.graph.node[0].output[1]


def shorten_weight(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    values = np.frombuffer(weight.raw_data, np.int8)[:-1]
    weight.CopyFrom(helper.make_tensor(weight.name, TensorProto.INT8, values.shape, values.tobytes(), raw=True))


def float_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.UINT8


def computed_weight(model: onnx.ModelProto) -> None:
    weight = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)))
    del model.graph.initializer[0]


WRONG = {
    "layout": (set_attribute("layout_version", 3), "another layout version"),
    "bits": (set_attribute("act_bits", 5), "act_bits"),
    "huge": (set_attribute("in_features", 1 << 40), "not a 32-bit integer"),
    "negative": (set_attribute("rank_shared", -8), "rank"),
    "experts": (set_attribute("num_experts", 2**31 - 1), "experts"),
    "wide": (set_attribute("out_features", 1 << 24), "wrong type or size"),
    "missing": (drop_attribute, "not lowered"),
    "inputs": (drop_weight, "wrong number of inputs"),
    "outputs": (drop_workspace, "wrong number of inputs or outputs|has output size 1"),
    "short": (shorten_weight, "wrong type or size"),
    "type": (float_weight, "wrong type or size"),
    "computed": (computed_weight, "no initializer"),
}


def run_sanitized(library: Path, folder: Path) -> str:
    """What a process with AddressSanitizer says of every model of a folder."""
    libraries = [  # that of C++ too, or AddressSanitizer misses its exceptions
        subprocess.run(
            [COMPILER[0], f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.onnxruntime_child", str(library), str(folder)],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "AddressSanitizer" not in done.stderr and "runtime error" not in done.stderr
    return done.stdout


def test_wrong_nodes_are_refused_under_sanitizers(sanitized: Path, tmp_path: Path) -> None:
    """A process with AddressSanitizer loads every model; every refusal is one of ours, and the right model runs."""
    for name, (change, _) in WRONG.items():
        model = packed_model([Mode("w4a8")], [256, 136])
        change(model)
        (tmp_path / f"{name}.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "right.onnx").write_bytes(packed_model([Mode("w4a8")], [256, 136]).SerializeToString())
    said = dict(line.split(": ", 1) for line in run_sanitized(sanitized, tmp_path).splitlines())
    assert said.pop("right") == "ran"
    assert said.keys() == WRONG.keys()
    for name, (_, words) in WRONG.items():
        assert re.search(words, said[name]), (name, said[name])
        assert re.search(r"QELinear: [^.]+\. \w[^.]+\.", said[name]) or name == "outputs", said[name]


def hostile(model: onnx.ModelProto, random: np.random.Generator) -> None:
    """Numbers that are odd, weights that are cut, and inputs that are missing or given twice."""
    node = model.graph.node[0]
    for _ in range(random.integers(1, 4)):
        choice, odd = random.integers(6), random.choice(ODD)
        if choice < 4:
            integers = [each for each in node.attribute if each.type == onnx.AttributeProto.INT]
            integers[random.integers(len(integers))].i = odd
        elif choice == 4 and len(node.input) > 2:
            place = random.integers(1, len(node.input))
            node.input.insert(place, node.input[place]) if odd % 2 else node.input.pop(place)
        else:
            weight = model.graph.initializer[random.integers(len(model.graph.initializer))]
            size = len(weight.raw_data) // max(weight.dims[0] * weight.dims[1], 1)
            weight.raw_data = weight.raw_data[: size * weight.dims[1] * (weight.dims[0] - 1)]
            weight.dims[0] -= 1


def test_hostile_nodes_end_in_errors_under_sanitizers(sanitized: Path, tmp_path: Path) -> None:
    """Each is refused in a sentence of ours, or is a layer that runs."""
    random = np.random.default_rng(1)
    for case in range(HOSTILE):
        model = packed_model([HALF_MODES[random.integers(len(HALF_MODES))]], [256, 136])
        hostile(model, random)
        (tmp_path / f"{case}.onnx").write_bytes(model.SerializeToString())
    said = [line.split(": ", 1)[1] for line in run_sanitized(sanitized, tmp_path).splitlines()]
    assert len(said) == HOSTILE
    ran = said.count("ran")
    assert ran < HOSTILE // 2
    assert [words for words in said if words != "ran" and "QELinear" not in words] == []


def test_wrong_inputs_are_refused(emulated: Path) -> None:
    model = packed_model([Mode("w4a8")], [256, 136])
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "K"
    session = open_session(model, emulated)
    with pytest.raises(Exception, match="QELinear: x is not a float16 tensor"):
        session.run(None, {"h0": np.zeros((1, 3, 255), np.float16)})


def test_what_ships_registers_and_asks_for_the_cuda_provider(tmp_path: Path) -> None:
    """Where there is no such provider, no other one takes the node."""
    library = ROOT / "build/plugin/libqe_ort.so"
    assert library.exists(), f"{library} is missing. Run plugins/ladder.sh, which builds it."
    model = packed_model([Mode("w4a8")], [256, 136])
    with pytest.raises(Exception, match="QELinear"):
        open_session(model, library)
    model.graph.node[0].domain, model.graph.node[0].op_type = "", "Identity"
    del model.graph.node[0].input[1:], model.graph.node[0].output[1:], model.graph.node[0].attribute[:]
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 256
    x = np.ones((1, 2, 256), np.float16)
    assert np.array_equal(open_session(model, library).run(None, {"h0": x})[0], x)


def test_without_the_kernels_it_says_where_they_come_from(emulated: Path, tmp_path: Path) -> None:
    alone = tmp_path / "libqe_ort.so"
    shutil.copyfile(emulated, alone)
    with pytest.raises(
        Exception, match=r"QELinear: libqe_plugin.so does not load .*Build both with qe-edge build-plugin"
    ):
        open_session(packed_model([Mode("w4a8")], [256, 136]), alone)
    old = tmp_path / "old.cpp"
    old.write_text('extern "C" int QeLayoutVersion() { return 3; }\n', encoding="utf-8")
    subprocess.run([*COMPILER, str(old), "-o", str(tmp_path / "libqe_plugin.so")], check=True)
    with pytest.raises(Exception, match="of another version"):
        subprocess_session(alone, tmp_path)


def subprocess_session(library: Path, folder: Path) -> None:
    """A process of its own, because a library that is loaded keeps what it found."""
    (folder / "right.onnx").write_bytes(packed_model([Mode("w4a8")], [256, 136]).SerializeToString())
    done = subprocess.run(
        [sys.executable, "-m", "tests.onnxruntime_child", str(library), str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    raise RuntimeError(done.stdout)
