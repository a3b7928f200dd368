"""The few calls of NVIDIA's driver that running an engine needs, without a CUDA toolkit, torch or cupy.

Not yet run on hardware.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np

from qe_edge.system.errors import ResourceError, TargetError

OUT_OF_MEMORY = 2
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
LIBRARY = "libcuda.so.1"


class Driver:
    """The first GPU with its primary context current.

    Raises:
        TargetError: If there is no driver or no GPU.

    Example:
        >>> driver = Driver()  # doctest: +SKIP
        >>> driver.compute_capability()  # doctest: +SKIP
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise _no_gpu("the NVIDIA driver is not installed") from error
        if self._library.cuInit(0) != 0:
            raise _no_gpu("the NVIDIA driver finds no GPU")
        self._device = ctypes.c_int()
        if self._library.cuDeviceGet(ctypes.byref(self._device), 0) != 0:
            raise _no_gpu("the NVIDIA driver finds no GPU")

    def compute_capability(self) -> tuple[int, int]:
        """Major and minor compute capability, for example (8, 7)."""
        value = ctypes.c_int()
        numbers = []
        for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
            numbers.append(value.value)
        return numbers[0], numbers[1]

    def open_context(self) -> None:
        """Make the device's primary context current in this thread; needed before anything below."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def create_stream(self) -> int:
        """A stream that does not wait for the default one."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)
        return int(stream.value or 0)

    def synchronize(self, stream: int) -> None:
        """Wait until a stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def allocate(self, size: int) -> int:
        """Device memory of `size` bytes.

        Raises:
            ResourceError: If there is not enough.
        """
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return pointer.value

    def free(self, pointer: int) -> None:
        """Give device memory back."""
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def clear(self, pointer: int, size: int, stream: int) -> None:
        """Set `size` bytes to 0 when the stream comes to it."""
        if size:
            count = ctypes.c_size_t(size)
            self._call("cuMemsetD8Async", ctypes.c_uint64(pointer), ctypes.c_ubyte(0), count, ctypes.c_void_p(stream))

    def copy(self, pointer: int, source: int, size: int, stream: int) -> None:
        """Copy `size` bytes on the device when the stream comes to it."""
        if size:
            count, places = ctypes.c_size_t(size), (ctypes.c_uint64(pointer), ctypes.c_uint64(source))
            self._call("cuMemcpyDtoDAsync_v2", *places, count, ctypes.c_void_p(stream))

    def upload(self, pointer: int, array: np.ndarray, stream: int) -> None:
        """Copy a C-contiguous array to the device; it must live until the stream is synchronized."""
        if array.nbytes:
            source = ctypes.c_void_p(array.ctypes.data)
            self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(pointer), source, array.nbytes, ctypes.c_void_p(stream))

    def download(self, array: np.ndarray, pointer: int, stream: int) -> None:
        """Copy from the device into a C-contiguous array, which is filled when the stream is synchronized."""
        if array.nbytes:
            target = ctypes.c_void_p(array.ctypes.data)
            self._call("cuMemcpyDtoHAsync_v2", target, ctypes.c_uint64(pointer), array.nbytes, ctypes.c_void_p(stream))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._library, name)(*arguments)
        if status == OUT_OF_MEMORY:
            raise ResourceError("The GPU's memory is full.", "Use a smaller batch or picture, or close other programs.")
        if status != 0:
            raise TargetError(f"The NVIDIA driver failed in {name} with code {status}.", "See 'qe-edge doctor'.")


@lru_cache(maxsize=1)
def compute_capability() -> tuple[int, int] | None:
    """Compute capability of this machine's first GPU, None without one.

    Example:
        >>> compute_capability()  # doctest: +SKIP
    """
    try:
        return Driver().compute_capability()
    except TargetError:
        return None


def _no_gpu(reason: str) -> TargetError:
    return TargetError(
        f"This engine needs an NVIDIA GPU, and {reason}.", "Run it on such a machine, or use the 'cpu' target here."
    )
