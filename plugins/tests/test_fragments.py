"""The fragment maps of the PTX emulator against a second statement of them: the layouts of CuTe's MMA_Traits."""

from __future__ import annotations

import numpy as np
import pytest

from emulator.ptx_collectives import multiply

Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]

# (thread shape, value shape), (thread strides, value strides): lane and value to a column-major index.
CUTE: dict[str, tuple[Layout, Layout]] = {
    "s8": ((((4, 8), (4, 2, 2)), ((64, 1), (16, 8, 256))), (((4, 8), (4, 2)), ((32, 1), (8, 128)))),
    "f16": ((((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))), (((4, 8), (2, 2)), ((16, 1), (8, 64)))),
    "f16 k8": ((((4, 8), (2, 2)), ((32, 1), (16, 8))), (((4, 8), (2,)), ((16, 1), (8,)))),
}
ACCUMULATOR: Layout = (((4, 8), (2, 2)), ((32, 1), (16, 8)))


def index(layout: Layout, lane: int, value: int) -> int:
    (threads, values), (thread_strides, value_strides) = layout
    total = 0
    for shape, strides, coordinate in ((threads, thread_strides, lane), (values, value_strides, value)):
        span = 1
        for extent, stride in zip(shape, strides, strict=True):
            total += coordinate // span % extent * stride
            span *= extent
    return total


@pytest.mark.parametrize("shape", CUTE)
def test_mma_follows_the_documented_fragments(shape: str) -> None:
    rng = np.random.default_rng(0)
    kind = shape.split(maxsplit=1)[0]
    per_register, depth = {"s8": (4, 32), "f16": (2, 16), "f16 k8": (2, 8)}[shape]
    registers = depth // per_register // 4  # of the B fragment; the A fragment has twice as many
    element = np.int8 if kind == "s8" else np.float16
    a = rng.integers(-9, 10, (16, depth)).astype(element)
    b = rng.integers(-9, 10, (depth, 8)).astype(element)
    a_layout, b_layout = CUTE[shape]
    a_values = np.array(
        [[a.flatten("F")[index(a_layout, lane, v)] for v in range(2 * registers * per_register)] for lane in range(32)],
        element,
    )
    b_values = np.array(  # CuTe's B is [n, k]
        [[b.T.flatten("F")[index(b_layout, lane, v)] for v in range(registers * per_register)] for lane in range(32)],
        element,
    )
    a_words = list(np.ascontiguousarray(a_values).view(np.uint32).T.copy())
    b_words = list(np.ascontiguousarray(b_values).view(np.uint32).T.copy())
    total = np.int32 if kind == "s8" else np.float32
    d = multiply(a_words, b_words, np.zeros((32, 4), total), kind)
    product = (a.astype(np.int64) @ b.astype(np.int64)).flatten("F")
    for lane in range(32):
        for value in range(4):
            assert d[lane, value] == product[index(ACCUMULATOR, lane, value)]
