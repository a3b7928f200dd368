"""Independent pieces of work, such as rows of a matrix, in threads of our own.

torch's and OpenBLAS' threads wait for each other in a busy loop after every operation: thousands of small operations
become a hundred times slower as soon as something else runs on the machine. Our threads have whole rows to themselves
and meet once, at the end. Inside each, torch computes with one thread. The cuts between rows do not depend on the
number of threads, so neither do the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from qe_edge.system.blas import one_lapack_thread

SMALL = 1 << 21  # weights up to which a layer gains nothing by a second thread of its own
MEDIUM = 1 << 25  # weights up to which, on two cores, another layer gains more by that thread; and both fit
Item = TypeVar("Item")
Result = TypeVar("Result")


def map_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call `work` for every item; results in their order.

    Work that calls BLAS must do so with one thread (`blas.one_lapack_thread` around this call), or the threads double.

    Example:
        >>> map_threads(lambda value: value * value, [1, 2, 3])
        [1, 4, 9]
    """
    threads = torch.get_num_threads()
    if len(items) <= 1 or threads == 1:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)  # what new threads of other libraries start with


def gains_by_one_thread(weights: int) -> bool:
    """Whether layers of this many weights end sooner side by side, with one thread each, than in turn with all.

    Example:
        >>> gains_by_one_thread(768 * 768), gains_by_one_thread(16384 * 4096)
        (True, False)
    """
    return weights <= (MEDIUM if torch.get_num_threads() <= 2 else SMALL)


def map_layers(
    work: Callable[[Item], Result], layers: Sequence[tuple[Item, int, int]], *, threads: bool = True
) -> Iterator[tuple[Item, Result]]:
    """Call `work` for layers: large ones in turn, with all threads, and then the others side by side.

    Of the large ones, those with most inputs come first: their statistics are the largest.

    Args:
        work: What to do.
        layers: What stands for a layer, its number of weights, and its number of inputs.
        threads: Whether threads help. Where a device computes, they would only wait for it.

    Example:
        >>> sorted(map_layers(str.upper, [("up", 32, 8), ("down", 32, 4)]))
        [('down', 'DOWN'), ('up', 'UP')]
    """
    apart = [layer for layer in layers if threads and gains_by_one_thread(layer[1])]
    for layer in sorted(layers, key=lambda layer: -layer[2]):
        if layer not in apart:
            yield layer[0], work(layer[0])
    apart.sort(key=lambda layer: -layer[1] * layer[2])  # the longest first
    items = [layer[0] for layer in apart]
    with one_lapack_thread():
        yield from zip(items, map_threads(work, items), strict=True)


def map_rows(work: Callable[[slice], Result], rows: int, piece: int) -> list[Result]:
    """Call `work` for slices of at most `piece` rows, in order of the rows; results in the same order.

    Example:
        >>> matrix = torch.arange(5.0)
        >>> map_rows(lambda rows: matrix[rows].tolist(), rows=5, piece=2)
        [[0.0, 1.0], [2.0, 3.0], [4.0]]
    """
    return map_threads(work, [slice(start, min(start + piece, rows)) for start in range(0, rows, piece)])
