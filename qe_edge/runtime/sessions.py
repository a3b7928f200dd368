"""The interface of every backend, and the backend of ONNX Runtime."""

from __future__ import annotations

import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qe_edge.runtime.graph_files import check_graph_file
from qe_edge.runtime.graph_specs import GraphFile
from qe_edge.system.errors import ArtifactError, ResourceError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state
else:
    ort = lazy_module("onnxruntime")
    state = lazy_module("onnxruntime.capi.onnxruntime_pybind11_state")

ACCURACY_LEVELS = (0, 4)  # of ONNX Runtime's INT4 products: exact, or activations quantized once more in blocks


@dataclass
class DeviceArray(ABC):
    """A tensor that a backend keeps where it computes.

    Attributes:
        shape: Its shape.
        dtype: Its element type.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @abstractmethod
    def clear(self) -> None:
        """Fill it with zeros, before the next call of a graph."""

    @abstractmethod
    def take_row(self, other: DeviceArray, row: int) -> None:
        """Copy a row of the first axis from a tensor of the same shape, before the next call of a graph."""


Array = np.ndarray | DeviceArray


class Session(Protocol):
    """One graph, ready to run.

    Attributes:
        steady: Whether calls of one token are to have the same shapes, so that they can be recorded.
    """

    steady: bool

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run on named inputs; returns the named outputs.

        Args:
            feeds: Inputs by name.
            into: Arrays of `zeros` into which outputs are written; other outputs come as numpy arrays.
        """

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
        """A tensor of zeros where the graph computes, for the KV cache."""


class OrtSession:
    """A graph in ONNX Runtime on the CPU.

    Args:
        folder: Folder of the graph.
        entry: Its entry in the manifest.
        accuracy_level: 0 is exact; 4 quantizes activations of INT4 products to 8 bits, which is faster.
        threads: Number of threads; None leaves it to ONNX Runtime.
        frugal: Whether memory is given back after each operation instead of being planned for the next ones. For
            pictures of any size it takes a third of the memory.

    Raises:
        ArtifactError: If the graph is damaged, ONNX Runtime cannot load it, or its inputs are not the manifest's.

    Example:
        >>> import onnx
        >>> from qe_edge.runtime.graph_specs import TensorSpec
        >>> text = '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Abs (x) }'
        >>> onnx.save(onnx.parser.parse_model(text), "abs.onnx")
        >>> x, y = (TensorSpec(name=name, dtype="float32", shape=(2,)) for name in ("x", "y"))
        >>> session = OrtSession(Path(), GraphFile(file="abs.onnx", inputs=(x,), outputs=(y,)), 0, threads=1)
        >>> session.run({"x": np.array([-1.0, 2.0], np.float32)})
        {'y': array([1., 2.], dtype=float32)}
    """

    def __init__(
        self, folder: Path, entry: GraphFile, accuracy_level: int, threads: int | None, *, frugal: bool = False
    ) -> None:
        self.steady = False
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
        if frugal:
            options.enable_mem_reuse = options.enable_mem_pattern = options.enable_cpu_mem_arena = False
        if threads is not None:
            options.intra_op_num_threads = threads
        self._name = entry.file
        self._session = _open(folder, entry, options)
        self._outputs = [spec.name for spec in entry.outputs]
        self._held: list[_Binding] = []

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run on named inputs; returns the named outputs, those of `into` in its arrays.

        Raises:
            ResourceError: If ONNX Runtime fails, most often for want of memory.
        """
        try:
            if not into:
                return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))
            return self._run_bound(feeds, into)
        except ort_errors() as error:
            raise ResourceError(
                f"ONNX Runtime failed in '{self._name}': {first_line(error)}",
                "Use fewer or smaller pictures, or a smaller batch.",
            ) from error

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
        """An array whose pages are taken when they are first written, which `np.zeros` does for large ones alone."""
        pages = mmap.mmap(-1, max(int(np.prod(shape)) * dtype.itemsize, 1))
        return np.frombuffer(pages, dtype, int(np.prod(shape))).reshape(shape)

    def _run_bound(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> dict[str, Array]:
        """Run with inputs and outputs bound to arrays, so that nothing is copied.

        Arrays that are read and written in place stay bound until other ones come: a token takes as long to bind a
        cache of 30 layers as to compute several of them. States are written into two arrays in turn, so that the last
        two bindings are kept.
        """
        written = {id(array) for array in into.values()}
        kept = {name: array for name, array in feeds.items() if id(array) in written}
        free = [name for name in self._outputs if name not in into]
        every, self._held = self._held, []  # another thread that comes meanwhile makes its own
        held = next((one for one in every if one.fits(kept, into)), None)
        if held is None:
            held = _Binding.of(self._session, free, kept, into)
        for name in free:
            held.binding.bind_output(name, "cpu")
        for name, array in feeds.items():
            if name not in kept:
                held.binding.bind_cpu_input(name, np.asarray(array))
        self._session.run_with_iobinding(held.binding)
        values = held.binding.get_outputs_as_ortvaluevector()  # no object for each of the cache
        found: dict[str, Array] = {name: values[place].numpy() for place, name in enumerate(free)}
        self._held = [held, *(one for one in every if one is not held)][:2]
        return {**found, **into}


@dataclass
class _Binding:
    """Arrays that are bound by their addresses, which does not keep them alive.

    Attributes:
        binding: ONNX Runtime's; its outputs begin with those that are no arrays of ours.
        inputs: Bound inputs by name.
        outputs: Likewise.
    """

    binding: Any
    inputs: dict[str, weakref.ref[np.ndarray]]
    outputs: dict[str, weakref.ref[np.ndarray]]

    @classmethod
    def of(cls, session: Any, free: list[str], feeds: Mapping[str, Array], into: Mapping[str, Array]) -> _Binding:  # noqa: ANN401 - an untyped extension module
        binding = session.io_binding()
        inputs = {name: np.asarray(array) for name, array in feeds.items()}
        outputs = {name: np.asarray(array) for name, array in into.items()}
        for name in free:
            binding.bind_output(name, "cpu")
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return cls(
            binding, *({name: weakref.ref(array) for name, array in every.items()} for every in (inputs, outputs))
        )

    def fits(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> bool:
        """Whether these very arrays are bound."""
        return all(
            bound.keys() == asked.keys() and all(bound[name]() is array for name, array in asked.items())
            for bound, asked in ((self.inputs, feeds), (self.outputs, into))
        )


def check_opens(folder: Path, entry: GraphFile) -> None:
    """Open a graph once in ONNX Runtime, as it is. Nothing of its weights is read, so that it takes no memory.

    Raises:
        ArtifactError: As for `OrtSession`.

    Example:
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> folder = Path("out/demo/engines/cpu")  # doctest: +SKIP
        >>> check_opens(folder, read_manifest(folder).graphs["language"])  # doctest: +SKIP
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    _open(folder, entry, options)


def _open(folder: Path, entry: GraphFile, options: ort.SessionOptions) -> Any:  # noqa: ANN401 - an untyped extension module
    """ONNX Runtime's session of a graph, whose file and signature are checked."""
    check_graph_file(folder, entry.file)
    options.log_severity_level = 3  # errors come as exceptions; warnings are for developers
    try:
        session = ort.InferenceSession(str(folder / entry.file), options, providers=["CPUExecutionProvider"])
    except ort_errors() as error:
        raise ArtifactError(
            f"ONNX Runtime cannot load '{folder / entry.file}': {first_line(error)}", "Export the model again."
        ) from error
    check_signature(session, entry, folder)
    return session


def check_signature(session: Any, entry: GraphFile, folder: Path) -> None:  # noqa: ANN401 - an untyped extension module
    """Refuse a graph whose inputs or outputs are not the manifest's.

    Raises:
        ArtifactError: If it is one.

    Example:
        >>> import onnxruntime  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> folder = Path("out/demo/onnx")  # doctest: +SKIP
        >>> session = onnxruntime.InferenceSession(folder / "merger.onnx")  # doctest: +SKIP
        >>> check_signature(session, read_manifest(folder).graphs["merger"], folder)  # doctest: +SKIP
    """
    for kind, found, wanted in (
        ("inputs", session.get_inputs(), entry.inputs),
        ("outputs", session.get_outputs(), entry.outputs),
    ):
        if [value.name for value in found] != [spec.name for spec in wanted]:
            raise ArtifactError(
                f"The {kind} of '{folder / entry.file}' are not those of the manifest.", "Export the model again."
            )


def ort_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions share no base of their own.

    Example:
        >>> ValueError in ort_errors()
        True
    """
    return (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile,
        state.NotImplemented, state.RuntimeException, RuntimeError, ValueError,
    )  # fmt: skip


def first_line(error: Exception) -> str:
    """The first line of ONNX Runtime's message, at most 300 characters.

    Example:
        >>> first_line(RuntimeError("No such file." + chr(10) + "See the log."))
        'No such file.'
    """
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
