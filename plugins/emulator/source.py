"""The source emulator (simt.h) as a Machine."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from emulator.plan import Launch

_ERROR_ROOM = 1 << 16


class SourceMachine:
    """Runs kernels that were compiled as host C++; addresses are host addresses.

    Args:
        path: the library that `emulator.build.source_emulator` makes.
        preempt_every: about one in this many memory accesses hands over to another thread; 0 switches only at
            barriers and warp collectives.
    """

    def __init__(self, path: Path, preempt_every: int = 0) -> None:
        self._library = ctypes.CDLL(str(path))
        self._preempt = preempt_every

    def add(self, array: NDArray[Any], name: str, *, writable: bool, zeroed: bool = False) -> int:
        """Register memory; its address is the host address."""
        address = int(array.ctypes.data)
        self._library.qe_emu_add_buffer(
            ctypes.c_void_p(address), ctypes.c_size_t(array.nbytes), 2 if zeroed else int(writable), name.encode()
        )
        return address

    def launch(self, launch: Launch, seed: int) -> list[str]:
        """Run one kernel over its grid; returns the errors that were found."""
        text = ctypes.create_string_buffer(_ERROR_ROOM)
        self._library.qe_emu_launch(
            ctypes.byref(launch), ctypes.c_uint64(seed), self._preempt, text, ctypes.c_size_t(_ERROR_ROOM)
        )
        return text.value.decode().splitlines()

    def clear(self) -> None:
        """Forget all memory."""
        self._library.qe_emu_clear_buffers()
