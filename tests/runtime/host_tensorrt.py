"""A machine that seems to have a GPU and TensorRT: the driver's memory is the host's, ONNX Runtime is the engine."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.signature import tensor_spec
from qe_edge.runtime import tensorrt_session
from qe_edge.runtime.engine_info import EngineInfo, GraphBuild
from qe_edge.runtime.limits import limits_of, with_capacity
from qe_edge.runtime.manifest import read_manifest


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
        assert stream == 1
        ctypes.memset(pointer, 0, size)

    def copy(self, pointer: int, source: int, size: int, stream: int) -> None:
        assert stream == 1
        ctypes.memmove(pointer, source, size)

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
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")  # exact
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


class HostEngine:
    """An engine as ONNX Runtime describes it."""

    def __init__(self, graph: bytes) -> None:
        self.context = HostContext(graph)
        values = (*self.context.session.get_inputs(), *self.context.session.get_outputs())
        self.shapes = {value.name: value.shape for value in values}

    def create_execution_context(self) -> HostContext:
        return self.context

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """-1 where a size is dynamic; no sizes of what the engine does not have."""
        return tuple(size if isinstance(size, int) else -1 for size in self.shapes.get(name, []))


def install(patch: pytest.MonkeyPatch) -> HostDriver:
    """Sessions find the machine until the patch is undone."""
    host = HostDriver()

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Logger) -> None:
            pass

        def deserialize_cuda_engine(self, data: bytes) -> HostEngine | None:
            return HostEngine(data) if data else None

    library = SimpleNamespace(Logger=Logger, Runtime=Runtime, __version__="10.7")
    patch.setattr(tensorrt_session, "Driver", lambda: host)
    patch.setattr(tensorrt_session, "_library_of", lambda _info: library)
    return host


def lowered_engines(onnx: Path, out: Path, *, in_place: bool) -> Path:
    """An engine folder whose engines are lowered graphs in one piece."""
    folder = Path(shutil.copytree(onnx, out))
    manifest, entries = read_manifest(folder), {}
    capacity = limits_of(manifest).context if in_place else None
    if capacity is not None:
        manifest = with_capacity(manifest, capacity)
    kv = manifest.kv.model_copy(update={"in_place": in_place})
    for name, entry in manifest.graphs.items():
        model = ir.load(folder / entry.file)
        lower_for_tensorrt(model, capacity=capacity)
        ir.external_data.load_to_model(model)
        (folder / f"{name}.engine").write_bytes(ir.to_proto(model).SerializeToString())
        specs = {key: tuple(map(tensor_spec, getattr(model.graph, key))) for key in ("inputs", "outputs")}
        entries[name] = entry.model_copy(update={"file": f"{name}.engine", **specs})
    digest = manifest.model_copy(update={"graphs": entries, "kv": kv}).write(folder).digest
    graphs = {name: GraphBuild(size=1, seconds=1) for name in entries}
    EngineInfo(target="tensorrt", backend="tensorrt", version="10.3", graphs=graphs, manifest=digest).write(folder)
    return folder
