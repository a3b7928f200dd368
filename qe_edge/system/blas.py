"""How many threads BLAS and LAPACK may use, and which float width they compute in.

OpenBLAS' threads wait for each other in a busy loop. In the eigenproblems of small matrices, or when something else
runs on the machine, that costs up to a hundred times what the second thread brings; one thread is also
bit-reproducible.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache

import numpy as np
from threadpoolctl import ThreadpoolController

DOUBLE_ENTRIES = 1 << 20  # entries of a layer's error up to which its corrections are computed in float64


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def one_lapack_thread() -> AbstractContextManager[object]:
    """Limit LAPACK to one thread, for eigenproblems and factorisations of any size."""
    context: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return context


def working_dtype(entries: int) -> type[np.float32 | np.float64]:
    """float64 for a layer of this many weights, float32 for a large one, at half the time and memory.

    A rounding error has about two significant digits that matter; float32 is for speed, float64 so that the theorems
    hold to the last digits where they are tested.
    """
    return np.float64 if entries <= DOUBLE_ENTRIES else np.float32
