"""A GPU as a Machine: the tests that ran on the emulators run on it unchanged. Not yet run on hardware."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emulator.plan import Launch

_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_ROOM = 128


class DeviceError(RuntimeError):
    """The driver refused a call."""


class DeviceMachine:
    """The first GPU, with the kernels of the plugin's own fatbin.

    Args:
        folder: the plugin's build folder, which has cuda13.fatbin and cuda12.fatbin.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DeviceError("There is no CUDA driver. Run this on a machine with an NVIDIA GPU.") from error
        self._call("cuInit", 0)
        device, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self._call("cuCtxSetCurrent", self._context)
        self.name, self.capability = self._describe(device)
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self.cuda = version.value
        image = (folder / ("cuda13.fatbin" if self.cuda >= 13000 else "cuda12.fatbin")).read_bytes()
        self._module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(self._module), image)
        self._memory: list[tuple[ctypes.c_uint64, NDArray[Any], bool]] = []

    def _call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - ctypes values of many kinds
        function = getattr(self._driver, f"{name}_v2", None) if name in _SECOND else None
        result = (function or getattr(self._driver, name))(*arguments)
        if result:
            raise DeviceError(f"{name} failed with CUDA error {result}. Look it up in cuda.h.")

    def _describe(self, device: ctypes.c_int) -> tuple[str, tuple[int, int]]:
        text, major, minor = ctypes.create_string_buffer(_NAME_ROOM), ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetName", text, _NAME_ROOM, device)
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
        return text.value.decode(), (major.value, minor.value)

    def add(self, array: NDArray[Any], name: str, *, writable: bool, zeroed: bool = False) -> int:  # noqa: ARG002 - for emulators
        """Copy an array to the GPU and return its address."""
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc", ctypes.byref(pointer), ctypes.c_size_t(max(16, array.nbytes)))
        self._call("cuMemcpyHtoD", pointer, array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))
        self._memory.append((pointer, array, writable))
        return int(pointer.value)

    def clear(self) -> None:
        """Free all memory."""
        for pointer, _, _ in self._memory:
            self._call("cuMemFree", pointer)
        self._memory.clear()

    def launch(self, launch: Launch, seed: int, *, first: bool = True) -> list[str]:  # noqa: ARG002 - it schedules as it likes
        """Run one kernel, wait, and copy what it may have written back into the arrays."""
        self.queue(launch)
        self._call("cuCtxSynchronize")
        for pointer, array, writable in self._memory:
            if writable:
                self._call(
                    "cuMemcpyDtoH", array.ctypes.data_as(ctypes.c_void_p), pointer, ctypes.c_size_t(array.nbytes)
                )
        return []

    def queue(self, launch: Launch) -> None:
        """Start one kernel and do not wait."""
        function = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(function), self._module, launch.kernel)
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, int(launch.shared_bytes))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(launch.args))
        grid = (int(launch.grid_x), int(launch.grid_y), 1, int(launch.threads), 1, 1)
        self._call("cuLaunchKernel", function, *grid, int(launch.shared_bytes), None, arguments, None)

    def microseconds(self, queue: Callable[[], object], repeats: int) -> float:
        """Median time of what `queue` starts on the default stream, between events, after a warm-up."""
        start, stop, elapsed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
        self._call("cuEventCreate", ctypes.byref(start), 0)
        self._call("cuEventCreate", ctypes.byref(stop), 0)
        times = []
        for _ in range(repeats + 3):
            self._call("cuEventRecord", start, None)
            queue()
            self._call("cuEventRecord", stop, None)
            self._call("cuEventSynchronize", stop)
            self._call("cuEventElapsedTime", ctypes.byref(elapsed), start, stop)
            times.append(1000 * elapsed.value)
        return float(np.median(times[3:]))


_SECOND = {"cuMemAlloc", "cuMemFree", "cuMemcpyHtoD", "cuMemcpyDtoH"}  # today's ABI has the suffix _v2
