"""CUDA's driver API through ctypes: the calls that the kit makes, and what it asks of a GPU."""

from __future__ import annotations

import ctypes
from typing import Any

OUT_OF_MEMORY = 2  # of CUresult
MULTIPROCESSORS, L2_BYTES, MAJOR, MINOR = 16, 38, 75, 76  # of CUdevice_attribute
MAX_DYNAMIC_SHARED_BYTES, PTX_VERSION = 8, 5  # of CUfunction_attribute
RELAXED_CAPTURE = 2  # of CUstreamCaptureMode
NON_BLOCKING = 1  # of CUstream_flags
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # of CUlaunchAttributeID

_WITH_SUFFIX = {
    "cuMemAlloc", "cuMemFree", "cuMemcpyHtoDAsync", "cuMemcpyDtoH", "cuMemcpyDtoDAsync", "cuStreamBeginCapture",
    "cuStreamDestroy", "cuEventDestroy",
}  # fmt: skip


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: a launch that may start before the one in front of it ends, or the blocks of a cluster."""

    _fields_ = [("id", ctypes.c_uint), ("padding", ctypes.c_char * 4), ("value", ctypes.c_uint * 16)]


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *[(name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    ]


class DeviceError(RuntimeError):
    """The driver refused a call."""


class NoMemoryError(DeviceError):
    """The GPU has too little memory."""


class Driver:
    """libcuda.so.1.

    Args:
        library: File name of the driver.

    Raises:
        DeviceError: If there is no driver.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DeviceError("There is no CUDA driver. Run this on a machine with an NVIDIA GPU.") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - ctypes values of many kinds
        """Call a function of the driver by the name that cuda.h gives it. Raises DeviceError."""
        function = getattr(self._library, f"{name}_v2" if name in _WITH_SUFFIX else name)
        result = function(*arguments)
        if result == OUT_OF_MEMORY:
            raise NoMemoryError(f"{name} found too little GPU memory. Close other programs, or leave this out.")
        if result:
            raise DeviceError(f"{name} failed with CUDA error {result}. Look it up in cuda.h.")

    def integer(self, name: str, *arguments: Any) -> int:  # noqa: ANN401 - ctypes values of many kinds
        """An int that a function writes to its first argument."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value

    def handle(self, name: str, *arguments: Any) -> ctypes.c_void_p:  # noqa: ANN401 - ctypes values of many kinds
        """A pointer that a function writes to its first argument."""
        value = ctypes.c_void_p()
        self.call(name, ctypes.byref(value), *arguments)
        return value
