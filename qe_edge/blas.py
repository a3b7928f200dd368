"""How many threads BLAS and LAPACK may use.

OpenBLAS' threads wait for each other in a busy loop. In the eigenproblems of small matrices, or when something else
runs on the machine, that costs up to a hundred times what the second thread brings; one thread is also
bit-reproducible.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache

from threadpoolctl import ThreadpoolController

THREADED_SIDE = 2048  # side of a matrix from which a second thread pays in matrix products


@lru_cache(maxsize=1)
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def blas_threads(side: int) -> AbstractContextManager[object]:
    """Limit numpy's and scipy's BLAS to one thread for matrices below `THREADED_SIDE`; larger ones keep all threads."""
    limit = 1 if side < THREADED_SIDE else None
    context: AbstractContextManager[object] = _controller().limit(limits=limit, user_api="blas")
    return context


def one_lapack_thread() -> AbstractContextManager[object]:
    """Limit LAPACK to one thread, for eigenproblems and factorisations of any size."""
    context: AbstractContextManager[object] = _controller().limit(limits=1, user_api="blas")
    return context
