"""The first GPU: what it is, its memory, launches of a plan, and the time of a CUDA graph."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device import driver as cuda
from device.driver import DeviceError, Driver
from emulator.plan import Launch

ALIGNMENT = 256
_FIRST_CHIP_THAT_OVERLAPS = 90  # code for older ones does not wait for the launch in front of it
_FIRST_DRIVER_THAT_OVERLAPS = 12030  # graphs of older ones do not keep it
_MOST_CLUSTER, _CLUSTER_THREADS, _CLUSTER_SHARED_BYTES = 8, 256, 96 << 10  # the largest of host/shape.h


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step


def median(times: list[float]) -> float:
    """The median; of an even number the upper of the two in the middle, a time that was measured."""
    return sorted(times)[len(times) // 2]


class Arena:
    """One allocation that is handed out in pieces. Pieces start at multiples of 256 bytes, as allocations do."""

    def __init__(self, gpu: Gpu, capacity: int) -> None:
        self._gpu, self._capacity, self._used = gpu, max(capacity, ALIGNMENT), 0
        self._start = gpu.allocate(self._capacity)

    def take(self, size: int) -> int:
        """The address of a piece."""
        here, self._used = self._used, self._used + round_up(max(size, 1), ALIGNMENT)
        if self._used > self._capacity:
            raise ValueError("The arena is too small. Count the pieces that are taken from it.")
        return self._start + here

    def put(self, array: NDArray[Any]) -> int:
        """The address of a copy of an array."""
        address = self.take(array.nbytes)
        self._gpu.copy_in(address, array)
        return address


class Gpu:
    """The first GPU with the plugin's kernels.

    Args:
        image: Contents of a fatbin or cubin; None for no kernels.
        driver: CUDA's driver; tests give a stand-in.

    Attributes:
        name: The GPU's name.
        capability: Its compute capability, for example 90.
        multiprocessors: How many it has.
        l2_bytes: Size of its L2 cache.
        cuda: CUDA version of its driver, as the driver writes it: 13000 is 13.0.
        clusters: Whether it and the kernels know clusters of blocks, 1 or 0.
    """

    def __init__(self, image: bytes | None, driver: Driver) -> None:
        self.driver = driver
        device = driver.integer("cuDeviceGet", 0)
        driver.call("cuCtxSetCurrent", driver.handle("cuDevicePrimaryCtxRetain", device))
        name = ctypes.create_string_buffer(128)
        driver.call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode()
        ask = {key: driver.integer("cuDeviceGetAttribute", key, device) for key in (
            cuda.MULTIPROCESSORS, cuda.L2_BYTES, cuda.MAJOR, cuda.MINOR)}  # fmt: skip
        self.capability = 10 * ask[cuda.MAJOR] + ask[cuda.MINOR]
        self.multiprocessors, self.l2_bytes = ask[cuda.MULTIPROCESSORS], ask[cuda.L2_BYTES]
        self.cuda = driver.integer("cuDriverGetVersion")
        self._image = image  # a driver may load kernels from it later
        self._module = None if image is None else driver.handle("cuModuleLoadData", image)
        self.clusters = self._has_clusters()
        self._functions: dict[bytes, tuple[ctypes.c_void_p, bool, int]] = {}  # with: may overlap, shared bytes granted
        self.stream = driver.handle("cuStreamCreate", cuda.NON_BLOCKING)
        self._events = [driver.handle("cuEventCreate", 0) for _ in range(2)]

    def _has_clusters(self) -> int:
        """As host/contexts.cpp asks."""
        if (
            self._module is None
            or self.capability < _FIRST_CHIP_THAT_OVERLAPS
            or self.cuda < _FIRST_DRIVER_THAT_OVERLAPS
        ):
            return 0
        config = cuda.LaunchConfig(_MOST_CLUSTER, 1, 1, _CLUSTER_THREADS, 1, 1, _CLUSTER_SHARED_BYTES)
        try:
            kernel = self.driver.handle("cuModuleGetFunction", self._module, b"qe_cluster_s8_c_f16")
            self.driver.call("cuFuncSetAttribute", kernel, cuda.MAX_DYNAMIC_SHARED_BYTES, _CLUSTER_SHARED_BYTES)
            largest = self.driver.integer("cuOccupancyMaxPotentialClusterSize", kernel, ctypes.byref(config))
        except DeviceError:
            return 0
        return int(largest >= _MOST_CLUSTER)

    def allocate(self, size: int) -> int:
        """The address of new memory. Raises NoMemoryError."""
        address = ctypes.c_uint64()
        self.driver.call("cuMemAlloc", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    @contextmanager
    def arena(self, capacity: int) -> Iterator[Arena]:
        """Memory that is freed at the end. `capacity` counts every piece rounded up to 256 bytes."""
        arena = Arena(self, capacity)
        try:
            yield arena
        finally:
            self.synchronize()
            self.driver.call("cuMemFree", ctypes.c_uint64(arena._start))

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Host to GPU, in the order of the stream."""
        flat = np.ascontiguousarray(array)
        if flat.nbytes:
            self.driver.call(
                "cuMemcpyHtoDAsync", ctypes.c_uint64(address), flat.ctypes.data_as(ctypes.c_void_p),
                ctypes.c_size_t(flat.nbytes), self.stream,
            )  # fmt: skip
            self.synchronize()

    def read(self, address: int, size: int) -> NDArray[np.uint8]:
        """GPU to host, after all work of the stream."""
        self.synchronize()
        out = np.empty(size, np.uint8)
        if size:
            self.driver.call(
                "cuMemcpyDtoH", out.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address), ctypes.c_size_t(size)
            )
        return out

    def copy(self, to: int, source: int, size: int) -> None:
        """GPU to GPU, in the order of the stream."""
        self.driver.call(
            "cuMemcpyDtoDAsync", ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size), self.stream
        )

    def fill(self, address: int, byte: int, size: int) -> None:
        """The same byte everywhere, in the order of the stream."""
        if size:
            self.driver.call("cuMemsetD8Async", ctypes.c_uint64(address), byte, ctypes.c_size_t(size), self.stream)

    def synchronize(self) -> None:
        """Wait for the stream. Raises DeviceError when something of it failed."""
        self.driver.call("cuStreamSynchronize", self.stream)

    def _function(self, name: bytes, shared: int) -> tuple[ctypes.c_void_p, bool]:
        function, overlaps, granted = self._functions.get(name, (None, False, 0))
        if function is None:
            function = self.driver.handle("cuModuleGetFunction", self._module, name)
            # host/contexts.cpp has the same conditions.
            overlaps = (
                self.capability >= _FIRST_CHIP_THAT_OVERLAPS
                and self.cuda >= _FIRST_DRIVER_THAT_OVERLAPS
                and self.driver.integer("cuFuncGetAttribute", cuda.PTX_VERSION, function) >= _FIRST_CHIP_THAT_OVERLAPS
            )
        if shared > granted:
            self.driver.call("cuFuncSetAttribute", function, cuda.MAX_DYNAMIC_SHARED_BYTES, shared)
        self._functions[name] = (function, overlaps, max(shared, granted))
        return function, overlaps

    @property
    def overlaps(self) -> bool:
        """Whether any kernel that was launched may start before the launch in front of it ends."""
        return any(overlaps for _, overlaps, _ in self._functions.values())

    def launch(self, launch: Launch) -> None:
        """Start one kernel and do not wait."""
        function, may_overlap = self._function(bytes(launch.kernel).rstrip(b"\0"), launch.shared_bytes)
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(launch.args))
        grid = (launch.grid_x, launch.grid_y, 1, launch.threads, 1, 1, launch.shared_bytes)
        values: list[tuple[int, tuple[int, ...]]] = []
        if may_overlap and launch.overlaps:
            values.append((cuda.PROGRAMMATIC_STREAM_SERIALIZATION, (1,)))
        if launch.cluster > 1:
            values.append((cuda.CLUSTER_DIMENSION, (launch.cluster, 1, 1)))
        if not values:
            self.driver.call("cuLaunchKernel", function, *grid, self.stream, arguments, None)
            return
        attributes = (cuda.LaunchAttribute * len(values))()
        for attribute, (kind, value) in zip(attributes, values, strict=True):
            attribute.id = kind
            attribute.value[: len(value)] = value
        config = cuda.LaunchConfig(*grid, self.stream, attributes, len(values))
        self.driver.call("cuLaunchKernelEx", ctypes.byref(config), function, arguments, None)

    def graph_time(self, queue: Callable[[], object], repeats: int = 11, warm_ups: int = 2) -> float:
        """Median microseconds of what `queue` starts on the stream, replayed from a CUDA graph."""
        call = self.driver.call
        queue()  # kernels are loaded before the capture
        self.synchronize()
        graph = ctypes.c_void_p()
        call("cuStreamBeginCapture", self.stream, cuda.RELAXED_CAPTURE)
        try:
            queue()
        finally:
            call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        return self._replay(graph, repeats, warm_ups)

    def _replay(self, graph: ctypes.c_void_p, repeats: int, warm_ups: int) -> float:
        call, (start, stop) = self.driver.call, self._events
        ready = self.driver.handle("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
        elapsed, times = ctypes.c_float(), []
        try:
            for _ in range(warm_ups + repeats):
                call("cuEventRecord", start, self.stream)
                call("cuGraphLaunch", ready, self.stream)
                call("cuEventRecord", stop, self.stream)
                call("cuEventSynchronize", stop)
                call("cuEventElapsedTime", ctypes.byref(elapsed), start, stop)
                times.append(1000.0 * elapsed.value)
        finally:
            call("cuGraphExecDestroy", ready)
            call("cuGraphDestroy", graph)
        return median(times[warm_ups:])


def load_gpu(image: Path, library: str = "libcuda.so.1") -> Gpu:
    """The first GPU with the kernels of a file. Raises DeviceError."""
    if not image.is_file() or not image.stat().st_size:
        raise cuda.DeviceError(f"There are no kernels in '{image}'. Run plugins/device_check.sh, which builds them.")
    return Gpu(image.read_bytes(), Driver(library))
