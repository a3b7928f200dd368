"""The TensorRT backend without a GPU: the driver's memory is the host's, and ONNX Runtime stands in for the engine.

What cannot be checked here is the library itself; what is checked is everything between it and the model.
"""

from __future__ import annotations

import ctypes
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.signature import tensor_spec
from qe_edge.models.family import Sample
from qe_edge.runtime import tensorrt_session
from qe_edge.runtime.cuda import Driver
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.engine_info import EngineInfo, GraphBuild
from qe_edge.runtime.limits import limits_of, with_capacity
from qe_edge.runtime.manifest import GRAPHS, read_manifest
from qe_edge.system.errors import InputError, TargetError
from tests.conftest import Exported
from tests.sealing import seal


class HostDriver:
    """Device memory that is host memory."""

    def __init__(self) -> None:
        self.blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def open_context(self) -> None:
        pass

    def create_stream(self) -> int:
        return 1

    def synchronize(self, stream: int) -> None:
        assert stream == 1

    def allocate(self, size: int) -> int:
        block = ctypes.create_string_buffer(max(size, 1))
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, pointer: int) -> None:
        del self.blocks[pointer]

    def clear(self, pointer: int, size: int, stream: int) -> None:
        ctypes.memset(pointer, 0, size)

    def upload(self, pointer: int, array: np.ndarray, stream: int) -> None:
        assert len(self.blocks[pointer]) >= array.nbytes
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, pointer: int, stream: int) -> None:
        ctypes.memmove(array.ctypes.data, pointer, array.nbytes)


class HostContext:
    """An execution context that computes in ONNX Runtime once all inputs are known."""

    def __init__(self, graph: bytes) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3  # it warns that it copies a cache that is not bound
        self.session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        self.types = {value.name: types[value.type] for value in self.session.get_inputs()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.results: dict[str, np.ndarray] = {}
        self.profiles: list[int] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> None:
        self.profiles.append(index)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape
        self.results = {}

    def set_tensor_address(self, name: str, pointer: int) -> None:
        self.addresses[name] = pointer

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if not self.results:
            feeds = {value.name: self._read(value.name) for value in self.session.get_inputs()}
            names = [value.name for value in self.session.get_outputs()]
            self.results = dict(zip(names, self.session.run(names, feeds), strict=True))
        return self.results[name].shape

    def execute_async_v3(self, stream: int) -> bool:
        for name, array in self.results.items():
            contiguous = np.ascontiguousarray(array)
            ctypes.memmove(self.addresses[name], contiguous.ctypes.data, contiguous.nbytes)
        return True

    def _read(self, name: str) -> np.ndarray:
        array = np.empty(self.shapes[name], self.types[name])
        ctypes.memmove(array.ctypes.data, self.addresses[name], array.nbytes)
        return array


@pytest.fixture(scope="module", params=["two caches", "in place"])
def engines(exported: Exported, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine folder whose engines are lowered graphs in one piece."""
    folder = Path(shutil.copytree(exported.onnx, tmp_path_factory.mktemp("engines") / "tensorrt"))
    manifest, entries = read_manifest(folder), {}
    capacity = limits_of(manifest).context if request.param == "in place" else None
    if capacity is not None:
        manifest = with_capacity(manifest, capacity)
    kv = manifest.kv.model_copy(update={"in_place": capacity is not None})
    for name, entry in manifest.graphs.items():
        model = ir.load(folder / entry.file)
        lower_for_tensorrt(model, capacity=capacity)
        ir.external_data.load_to_model(model)
        (folder / f"{name}.engine").write_bytes(ir.to_proto(model).SerializeToString())
        specs = {key: tuple(map(tensor_spec, getattr(model.graph, key))) for key in ("inputs", "outputs")}
        entries[name] = entry.model_copy(update={"file": f"{name}.engine", **specs})
    digest = manifest.model_copy(update={"graphs": entries, "kv": kv}).write(folder).digest
    graphs = {name: GraphBuild(size=1, seconds=1) for name in GRAPHS}
    EngineInfo(target="tensorrt", backend="tensorrt", version="10.3", graphs=graphs, manifest=digest).write(folder)
    return folder


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """A machine that seems to have a GPU and TensorRT."""
    host = HostDriver()

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Logger) -> None:
            pass

        def deserialize_cuda_engine(self, data: bytes) -> object:
            context = HostContext(data) if data else None
            return context and SimpleNamespace(create_execution_context=lambda: context)

    library = SimpleNamespace(Logger=Logger, Runtime=Runtime, __version__="10.7")
    monkeypatch.setattr(tensorrt_session, "Driver", lambda: host)
    monkeypatch.setattr(tensorrt_session, "_library_of", lambda _info: library)
    return host


def test_answers_come_through_device_memory(
    engines: Path, exported: Exported, driver: HostDriver, held_out: list[Sample]
) -> None:
    expected = VisionLanguageEngine.load(exported.onnx, threads=1)
    engine = VisionLanguageEngine.load(engines)
    assert engine.generate(held_out[:3], 5) == expected.generate(held_out[:3], 5)
    encoded = engine.encode(held_out[:3], answers=True)
    valid = encoded.attention_mask == 1
    difference = (engine.logits(encoded) - expected.logits(encoded))[valid]
    assert np.abs(difference).max() < 1
    del engine
    assert driver.blocks == {}  # every buffer was given back


def test_the_cache_stays_on_the_device(engines: Path, driver: HostDriver, held_out: list[Sample]) -> None:
    engine = VisionLanguageEngine.load(engines)
    encoded = engine.encode(held_out[:1])
    _, state = engine.prefill(encoded, engine.features(encoded))
    buffers = [*state.cache.past.values(), *state.cache.present.values()]
    assert {type(value) for value in buffers} == {tensorrt_session.Buffer}
    assert {value.dtype.name for value in buffers} == {"float16"}
    in_place = engine.manifest.kv.in_place
    assert len({id(value) for value in buffers}) == len(state.cache.past) * (1 if in_place else 2)
    engine.decode(state, np.array([5]))
    taken = set(driver.blocks)
    for token in (6, 7):
        engine.decode(state, np.array([token]))
    assert set(driver.blocks) == taken  # nothing is allocated for a token
    session = engine._sessions["language"]
    assert session._context.profiles == [0, 1]  # type: ignore[attr-defined]


def test_more_than_the_engine_was_built_for(engines: Path, driver: HostDriver, held_out: list[Sample]) -> None:
    engine = VisionLanguageEngine.load(engines)
    with pytest.raises(InputError, match="does not take 5 questions at a time: it was built for 4"):
        engine.generate([held_out[0]] * 5, 2)


def test_an_engine_of_another_version(engines: Path, driver: HostDriver, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engines, tmp_path / "engines"))
    (folder / "visual.engine").write_bytes(b"")
    seal(folder)
    with pytest.raises(TargetError, match=r"built with tensorrt 10\.3 and cannot be loaded by 10\.7") as caught:
        VisionLanguageEngine.load(folder)
    assert "Build the target 'tensorrt' again" in caught.value.remedy


def test_the_library_is_missing(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    monkeypatch.setattr(tensorrt_session, "Driver", HostDriver)
    with pytest.raises(TargetError, match="tensorrt, which is not installed"):
        VisionLanguageEngine.load(engines)


def test_the_fake_driver_has_the_real_ones_calls() -> None:
    calls = {name for name in vars(HostDriver) if not name.startswith("_")}
    assert calls <= set(vars(Driver))
