"""A graph in ONNX Runtime's CUDA provider: its tensors are bound, and the KV cache stays on the GPU.

Not yet run on a GPU. Tests run every line but the provider's own on the CPU provider, with the same class.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.runtime.cuda_provider import INSTALL, PROVIDER, check_provider
from qe_edge.runtime.engine_info import EngineInfo
from qe_edge.runtime.graph_files import check_graph_file
from qe_edge.runtime.graph_specs import GraphFile
from qe_edge.runtime.plugin_library import find_operator_library
from qe_edge.runtime.sessions import Array, DeviceArray, check_signature, first_line, ort_errors
from qe_edge.system.c_output import held_stderr
from qe_edge.system.errors import ArtifactError, ResourceError, TargetError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import onnxruntime as ort
else:
    ort = lazy_module("onnxruntime")

NOT_STARTED = "ONNX Runtime cannot start its CUDA provider."
MISSING = re.compile(r"(lib[\w.-]+\.so[\d.]*): cannot open")
MOST_GRAPHS, NO_GRAPH = 8, -1  # ONNX Runtime does not record a run with the latter number
OURS = "QELinear: "  # how the operator's own errors begin
OPTIONS = {
    "arena_extend_strategy": "kSameAsRequested",  # memory as it is asked for, not the next power of two
    "cudnn_conv_algo_search": "HEURISTIC",  # pictures have many sizes, and a search would run for each
    "use_tf32": "0",  # what runs in float32 does so because it must be exact
}


@dataclass(frozen=True)
class OrtDevice:
    """Where a model's graphs run.

    Attributes:
        operator: Library of the layers' operator, None for graphs without such layers.
        provider: Name of ONNX Runtime's provider.
        name: How ONNX Runtime calls the memory that it computes in.
        options: Of the provider.

    Example:
        >>> OrtDevice(None, "CPUExecutionProvider", "cpu", {}).start()
    """

    operator: Path | None
    provider: str = PROVIDER
    name: str = "cuda"
    options: Mapping[str, str] = field(default_factory=lambda: dict(OPTIONS))

    def start(self) -> None:
        """Start the provider, which loads the libraries of CUDA and cuDNN.

        Raises:
            TargetError: If it cannot start, most often because such a library is missing.
        """
        # what is missing is printed, in colours, to both
        with held_stderr() as held, redirect_stdout(io.StringIO()) as printed:
            try:
                if self.provider == PROVIDER and hasattr(ort, "preload_dlls"):
                    ort.preload_dlls()  # CUDA and cuDNN from PyPI's packages, where they are
                ort.SessionOptions().add_provider(self.provider, dict(self.options))
            except ort_errors() as error:
                missing = MISSING.search(printed.getvalue() + held().decode(errors="replace"))
                reason = f" {missing.group(1)} is missing." if missing else f" It says: {first_line(error)}"
                raise TargetError(NOT_STARTED + reason, INSTALL) from error


@dataclass
class OrtBuffer(DeviceArray):
    """A tensor in the memory of a provider.

    Attributes:
        value: ONNX Runtime's `OrtValue`, which owns the memory.
    """

    value: Any = field(repr=False)

    def clear(self) -> None:
        """Fill it with zeros."""
        self.value.update_inplace(np.zeros(self.shape, self.dtype))

    def take_row(self, other: DeviceArray, row: int) -> None:
        """Copy a row of the first axis from a tensor of the same shape, by way of the host."""
        if isinstance(other, OrtBuffer):
            content = np.array(self.value.numpy())
            content[row] = other.value.numpy()[row]
            self.value.update_inplace(content)


def open_device(info: EngineInfo, plugin_library: Path | None = None) -> OrtDevice:
    """The GPU, for engines that were built for it.

    Args:
        info: How they were built.
        plugin_library: The plugin's library, None for the one that is found; only engines that need it load it.

    Raises:
        TargetError: If there is no GPU, or a library is missing.

    Example:
        >>> from qe_edge.runtime.engine_info import read_engine_info  # doctest: +SKIP
        >>> device = open_device(read_engine_info(Path("out/demo/engines/cuda")))  # doctest: +SKIP
    """
    check_provider()
    device = OrtDevice(None if info.plugin is None else find_operator_library(plugin_library))
    device.start()
    return device


class OrtDeviceSession:
    """One graph. Its inputs have rooms on the device that later calls of the same shapes use again.

    Several threads may call it; they take turns.

    A steady session records a call of one token as a CUDA graph when it comes again with every tensor at the same
    place, and repeats that from then on. Each such set of places has a graph of its own, of which ONNX Runtime forgets
    none, so there are at most `MOST_GRAPHS`; further calls run as they are.

    Args:
        folder: Folder of the graph.
        entry: Its entry in the manifest.
        device: Where it runs.
        steady: Whether it records calls of one token.

    Attributes:
        steady: Likewise.

    Raises:
        TargetError: If the provider or the operator cannot be used here.
        ArtifactError: If the graph is damaged, or its inputs are not the manifest's.

    Example:
        >>> import onnx
        >>> from qe_edge.runtime.graph_specs import TensorSpec
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
        >>> onnx.save(onnx.parser.parse_model(text), "abs.onnx")
        >>> x, y = (TensorSpec(name=name, dtype="float32", shape=(2,)) for name in ("x", "y"))
        >>> entry = GraphFile(file="abs.onnx", inputs=(x,), outputs=(y,))
        >>> session = OrtDeviceSession(Path(), entry, OrtDevice(None, "CPUExecutionProvider", "cpu", {}))
        >>> session.run({"x": np.array([-1, 2], np.float32)})["y"].tolist()
        [1.0, 2.0]
    """

    def __init__(self, folder: Path, entry: GraphFile, device: OrtDevice, *, steady: bool = False) -> None:
        check_graph_file(folder, entry.file)
        self.steady = steady
        self._entry, self._device = entry, device
        self._session = self._open(folder)
        check_signature(self._session, entry, folder)
        self._rooms: dict[tuple[str, bool], OrtBuffer] = {}  # by input, and whether for steps
        self._turn = threading.Lock()
        self._results: dict[tuple[object, ...], dict[str, Any]] = {}  # outputs of calls that may be recorded, by places

    def _open(self, folder: Path) -> Any:  # noqa: ANN401 - an untyped extension module
        device = self._device
        recorded = {"enable_cuda_graph": "1"} if self.steady and device.provider == PROVIDER else {}
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors come as exceptions; warnings are for developers
        try:
            if device.operator is not None:
                options.register_custom_ops_library(str(device.operator))
            providers = [(device.provider, {**device.options, **recorded})]
            session = ort.InferenceSession(
                str(folder / self._entry.file), options, providers=providers, enable_fallback=0
            )
        except ort_errors() as error:
            raise _refusal(error, folder / self._entry.file) from error
        if session.get_providers()[0] != device.provider:  # ONNX Runtime went on without it
            raise TargetError(NOT_STARTED, INSTALL)
        session.disable_fallback()
        return session

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run on named inputs; outputs come back as numpy arrays, those of `into` stay on the device.

        Raises:
            ResourceError: If ONNX Runtime fails, most often for want of the GPU's memory.
        """
        kept = {name: array for name, array in (into or {}).items() if isinstance(array, OrtBuffer)}
        free = [spec.name for spec in self._entry.outputs if spec.name not in kept]
        with self._turn:
            try:
                step = self.steady and feeds[self._entry.inputs[0].name].shape[1] == 1
                bound = {
                    spec.name: self._bound((spec.name, step), feeds[spec.name], spec.dtype)
                    for spec in self._entry.inputs
                }
                values = self._run(bound, kept, free, step=step)
                return {**{name: values[name].numpy() for name in free}, **kept}
            except ort_errors() as error:
                raise ResourceError(
                    f"ONNX Runtime failed in '{self._entry.file}': {first_line(error)}",
                    "Use fewer or smaller pictures, or a smaller batch; see 'qe-edge doctor'.",
                ) from error

    def _run(
        self, bound: Mapping[str, OrtBuffer], kept: Mapping[str, OrtBuffer], free: list[str], *, step: bool
    ) -> dict[str, Any]:
        """Run with all tensors bound; returns the `OrtValue`s of the outputs that are not kept, by name.

        Args:
            bound: Inputs.
            kept: Outputs that have memory already.
            free: The other outputs.
            step: Whether the call may be recorded.
        """
        options = ort.RunOptions()
        buffers = (*bound.values(), *kept.values())
        places = tuple((buffer.value.data_ptr(), buffer.shape) for buffer in buffers) if step else ()
        known = self._results.get(places, {})
        if self.steady:
            number = list(self._results).index(places) if known else NO_GRAPH
            options.add_run_config_entry("gpu_graph_id", str(number))
        binding = self._session.io_binding()
        for name, buffer in bound.items():
            binding.bind_ortvalue_input(name, buffer.value)
        for name in free:
            if name in known:
                binding.bind_ortvalue_output(name, known[name])
            else:
                binding.bind_output(name, self._device.name if step else "cpu")
        for name, buffer in kept.items():
            binding.bind_ortvalue_output(name, buffer.value)
        self._session.run_with_iobinding(binding, options)
        values = binding.get_outputs_as_ortvaluevector()  # no object for each of the cache
        found = {name: ort.OrtValue(values[place]) for place, name in enumerate(free)}
        if step and not known and len(self._results) < MOST_GRAPHS:
            self._results[places] = found
        return found

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> OrtBuffer:
        """Memory of zeros on the device: a number that is masked and not finite would spoil a sum.

        Raises:
            ResourceError: If the device has too little.
        """
        try:
            buffer = self._buffer(shape, dtype)
            buffer.clear()
        except ort_errors() as error:
            size = int(np.prod(shape)) * dtype.itemsize
            raise ResourceError(
                f"The GPU has no {size >> 20} MiB for a KV cache: {first_line(error)}", "Choose a smaller context."
            ) from error
        return buffer

    def _bound(self, name: tuple[str, bool], array: Array, dtype: str) -> OrtBuffer:
        """An input where the graph reads it: itself, or copied into its room; steps have rooms of their own."""
        if isinstance(array, OrtBuffer):
            return array
        host = np.ascontiguousarray(np.asarray(array), dtype=dtype)
        room = self._rooms.get(name)
        if room is None or room.shape != host.shape:
            self._rooms.pop(name, None)  # before another is taken
            room = self._rooms[name] = self._buffer(host.shape, host.dtype)
        if host.size:
            room.value.update_inplace(host)
        return room

    def _buffer(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> OrtBuffer:
        value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype.type, self._device.name, 0)
        return OrtBuffer(tuple(shape), np.dtype(dtype), value)


def _refusal(error: Exception, file: Path) -> TargetError | ArtifactError:
    """The operator's own two sentences, or what ONNX Runtime says."""
    said = first_line(error)
    _, ours, words = said.partition(OURS)
    if ours:
        problem, _, remedy = words.partition(". ")
        return TargetError(f"{problem.rstrip('.')}.", remedy or "Build the target 'cuda' again.")
    return ArtifactError(f"ONNX Runtime cannot load '{file}': {said}", "Export and build the model again.")
