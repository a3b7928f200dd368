"""How many threads BLAS and LAPACK may use, and which float width they compute in.

OpenBLAS' threads wait for each other in a busy loop. For eigenproblems of small matrices, or on a busy machine, the
waiting takes up to a hundred times as long as a second thread saves. One thread also gives the same bits every time.
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
    """Limit LAPACK to one thread, for eigenproblems and factorisations of any size.

    Example:
        >>> with one_lapack_thread():
        ...     values = np.linalg.eigvalsh(np.array([[2.0, 1.0], [1.0, 2.0]]))
        >>> values.round(6).tolist()
        [1.0, 3.0]
    """
    context: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return context


def working_dtype(entries: int) -> type[np.float32 | np.float64]:
    """The dtype for the error of a layer with this many weights: float64 for a small layer, float32 for a large one.

    float32 takes half the time and memory, and about two digits of a rounding error matter. In float64 the theorems
    hold to the last digits, as the tests ask.

    Example:
        >>> working_dtype(768 * 768).__name__, working_dtype(4096 * 4096).__name__
        ('float64', 'float32')
    """
    return np.float64 if entries <= DOUBLE_ENTRIES else np.float32
