"""A graph in TensorRT or TensorRT-RTX.

Not yet run on hardware: written against the libraries' documentation and checked as far as a machine without a GPU
can check it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qe_edge.runtime.cuda import Driver
from qe_edge.runtime.engine_info import EngineInfo
from qe_edge.runtime.graph_specs import TensorSpec
from qe_edge.runtime.manifest import GraphEntry
from qe_edge.runtime.plugin_library import find_plugin_library, load_plugin_library
from qe_edge.runtime.sessions import Array, DeviceArray
from qe_edge.system.errors import ArtifactError, InputError, ResourceError, TargetError

PIECE = 1 << 16  # bytes that rooms of inputs and outputs are multiples of


class Device:
    """The GPU, the library and one stream, shared by a model's graphs.

    Args:
        info: The build of the engines.
        plugin_library: The plugin's library, None for the one that is found; only engines that need it load it.

    Raises:
        TargetError: If there is no GPU, or a library is missing.

    Example:
        >>> from qe_edge.runtime.engine_info import read_engine_info  # doctest: +SKIP
        >>> device = Device(read_engine_info(Path("out/demo/engines/tensorrt")))  # doctest: +SKIP
    """

    def __init__(self, info: EngineInfo, plugin_library: Path | None = None) -> None:
        self.info = info
        self.driver = Driver()
        self.trt = _library_of(info)
        if info.plugin is not None:
            load_plugin_library(self.trt, find_plugin_library(plugin_library))
        self.driver.open_context()
        self.stream = self.driver.create_stream()
        self.logger = self.trt.Logger(self.trt.Logger.ERROR)
        self.runtime = self.trt.Runtime(self.logger)


def check_device(info: EngineInfo, plugin_library: Path | None = None) -> None:
    """Refuse engines that this machine cannot run, before anything of them is loaded.

    Raises:
        TargetError: If there is no GPU, or a library is missing.

    Example:
        >>> from qe_edge.runtime.engine_info import read_engine_info  # doctest: +SKIP
        >>> check_device(read_engine_info(Path("out/demo/engines/tensorrt")))  # doctest: +SKIP
    """
    Driver()
    _library_of(info)
    if info.plugin is not None:
        find_plugin_library(plugin_library)


def _library_of(info: EngineInfo) -> Any:  # noqa: ANN401 - an untyped extension module
    try:
        return importlib.import_module(info.backend)
    except ImportError as error:
        raise TargetError(
            f"These engines need the Python module {info.backend}, which is not installed.",
            f"Install it in version {info.version}, or use the 'cpu' target.",
        ) from error


@dataclass
class Buffer(DeviceArray):
    """A tensor on the device; its memory goes back with the object.

    Attributes:
        driver: Driver that gave the memory.
        stream: Where its content is written.
        pointer: Device address.
    """

    driver: Driver = field(repr=False)
    stream: int
    pointer: int = 0

    def __post_init__(self) -> None:
        self.pointer = self.driver.allocate(self.nbytes)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def clear(self) -> None:
        """Fill it with zeros."""
        self.driver.clear(self.pointer, self.nbytes, self.stream)

    def take_row(self, other: DeviceArray, row: int) -> None:
        """Copy a row of the first axis from a tensor of the same shape."""
        if isinstance(other, Buffer):
            size = self.nbytes // self.shape[0]
            self.driver.copy(self.pointer + row * size, other.pointer + row * size, size, self.stream)

    def __del__(self) -> None:
        if self.pointer:
            self.driver.free(self.pointer)


class TensorRTSession:
    """One engine. Its inputs and outputs have rooms on the device that later calls use again.

    Args:
        device: The GPU.
        folder: Folder of the engine.
        entry: Its entry in the manifest.

    Raises:
        TargetError: If the engine does not fit this GPU or library version.
        ArtifactError: If its tensors have other sizes than the manifest says.

    Example:
        >>> from qe_edge.runtime.engine_info import read_engine_info  # doctest: +SKIP
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> folder = Path("out/demo/engines/tensorrt")  # doctest: +SKIP
        >>> entry = read_manifest(folder).graphs["language"]  # doctest: +SKIP
        >>> session = TensorRTSession(Device(read_engine_info(folder)), folder, entry)  # doctest: +SKIP
    """

    def __init__(self, device: Device, folder: Path, entry: GraphEntry) -> None:
        self.steady = False
        self._device = device
        self._entry = entry
        info = device.info
        self._engine = device.runtime.deserialize_cuda_engine((folder / entry.file).read_bytes())
        if self._engine is None:
            raise TargetError(
                f"'{folder / entry.file}' was built with {info.backend} {info.version} and cannot be loaded by "
                f"{device.trt.__version__} on this GPU.",
                f"Build the target '{info.target}' again on this machine.",
            )
        for spec in (*entry.inputs, *entry.outputs):
            _check_tensor(self._engine, spec, folder / entry.file)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise ResourceError(f"'{entry.file}' does not fit into the GPU's memory.", "Close other programs.")
        self._profile = -1
        self._rooms: dict[str, Buffer] = {}

    def run(self, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run on named inputs; outputs come back as numpy arrays, and outputs of `into` stay on the device.

        Raises:
            InputError: If no profile of the engine takes the shapes.
            ResourceError: If the GPU's memory is full.
        """
        driver, stream = self._device.driver, self._device.stream
        self._select_profile({name: array.shape for name, array in feeds.items()})
        living = []  # what the stream still reads
        for spec in self._entry.inputs:
            array = feeds[spec.name]
            if isinstance(array, Buffer):
                pointer = array.pointer
            else:
                living.append(np.ascontiguousarray(np.asarray(array), dtype=spec.dtype))
                pointer = self._room(spec.name, living[-1].nbytes)
                driver.upload(pointer, living[-1], stream)
            self._context.set_input_shape(spec.name, tuple(array.shape))
            self._context.set_tensor_address(spec.name, pointer)
        kept = {name: array for name, array in (into or {}).items() if isinstance(array, Buffer)}
        free: dict[str, tuple[np.ndarray, int]] = {}
        for spec in self._entry.outputs:
            if spec.name in kept:
                self._context.set_tensor_address(spec.name, kept[spec.name].pointer)
                continue
            host = np.empty(tuple(self._context.get_tensor_shape(spec.name)), spec.dtype)
            free[spec.name] = host, self._room(spec.name, host.nbytes)
            self._context.set_tensor_address(spec.name, free[spec.name][1])
        if not self._context.execute_async_v3(stream):
            raise ResourceError(
                f"'{self._entry.file}' failed on the GPU.", "Use a smaller batch or picture; see 'qe-edge doctor'."
            )
        for host, pointer in free.values():
            driver.download(host, pointer, stream)
        driver.synchronize(stream)
        return {**{name: host for name, (host, _) in free.items()}, **kept}

    def zeros(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Buffer:
        """Device memory of zeros: a number that is masked and not finite would spoil a sum."""
        buffer = Buffer(shape, dtype, self._device.driver, self._device.stream)
        buffer.clear()
        return buffer

    def _select_profile(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Switch to the profile that takes all shapes; of several to that of the smallest first input."""
        fitting = [
            (int(np.prod(next(iter(profile.values()))[2])), index)
            for index, profile in enumerate(self._entry.profiles.values())
            if all(_fits(shapes[name], smallest, largest) for name, (smallest, _, largest) in profile.items())
        ]
        if not fitting:
            raise self._too_large(shapes)
        _, index = min(fitting)
        if index != self._profile:
            self._context.set_optimization_profile_async(index, self._device.stream)
            self._profile = index

    def _too_large(self, shapes: Mapping[str, tuple[int, ...]]) -> InputError:
        """Names the first input that is outside the profile that takes most of the inputs."""
        reasons = []
        for profile in self._entry.profiles.values():
            wrong = [name for name, (low, _, high) in profile.items() if not _fits(shapes[name], low, high)]
            reasons.append(
                (len(wrong), f"'{wrong[0]}' is {list(shapes[wrong[0]])}, at most {list(profile[wrong[0]][2])}")
            )
        return InputError(
            f"The engine '{self._entry.file}' was not built for inputs of this size: {min(reasons)[1]}.",
            "Use a smaller picture, prompt or batch, or build with a larger --max-patches, --max-tiles, --max-prompt, "
            "--max-context or --max-batch.",
        )

    def _room(self, name: str, size: int) -> int:
        """Device address of at least `size` bytes for an input or output, taken anew only where it must grow."""
        found = self._rooms.get(name)
        if found is None or found.shape[0] < size:
            self._rooms.pop(name, None)
            whole = -(-max(size, 1) // PIECE) * PIECE  # the mask grows with every token
            found = self._rooms[name] = Buffer((whole,), np.dtype(np.uint8), self._device.driver, self._device.stream)
        return found.pointer


def _check_tensor(engine: Any, spec: TensorSpec, file: Path) -> None:  # noqa: ANN401 - an untyped extension module
    """Refuse a tensor of another size than the manifest says: the engine would write beyond its buffer."""
    found = tuple(engine.get_tensor_shape(spec.name))  # -1 where a size is dynamic
    fits = len(found) == len(spec.shape) and all(
        size in (-1, wanted) or not isinstance(wanted, int) for size, wanted in zip(found, spec.shape, strict=True)
    )
    if not fits:
        raise ArtifactError(
            f"The tensor '{spec.name}' of '{file}' is {list(found)}, the manifest says {list(spec.shape)}.",
            "Build the model again.",
        )


def _fits(shape: tuple[int, ...], smallest: tuple[int, ...], largest: tuple[int, ...]) -> bool:
    return len(shape) == len(smallest) and all(
        low <= size <= high for low, size, high in zip(smallest, shape, largest, strict=True)
    )
