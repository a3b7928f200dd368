"""Instructions that a whole warp executes together: mma, ldmatrix, shuffles and votes.

Fragment maps: PTX ISA, "Matrix Fragments for mma.m16n8k32", "mma.m16n8k16" and "mma.m16n8k8".
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from emulator.ptx_memory_ops import pointer_of
from emulator.ptx_ops import Step
from emulator.ptx_text import Instruction, Kernel, PtxError, vector
from emulator.ptx_warp import LANES, Lanes, Mask, Warp, reader, writer
from prepack.floats import from_bits

LANE = np.arange(LANES)
GROUP, PAIR = LANE // 4, LANE % 4


@lru_cache
def _places(width: int, registers: int) -> tuple[Lanes, Lanes]:
    """Where A's and B's elements are among all lanes' registers of `width` elements: ``[16, 4wr]`` and ``[4wr, 8]``.

    B has `registers` registers a lane, and A twice as many.
    """
    a, b = np.zeros((16, 4 * width * registers), np.int64), np.zeros((4 * width * registers, 8), np.int64)
    element = np.arange(width)
    for register in range(2 * registers):
        k = PAIR[:, None] * width + element + 4 * width * (register // 2)
        a[(GROUP + 8 * (register % 2))[:, None], k] = (LANE[:, None] * 2 * registers + register) * width + element
    for register in range(registers):
        k = PAIR[:, None] * width + element + 4 * width * register
        b[k, GROUP[:, None]] = (LANE[:, None] * registers + register) * width + element
    return a, b


_ROWS, _COLUMNS = GROUP[:, None] + 8 * (np.arange(4) // 2), PAIR[:, None] * 2 + np.arange(4) % 2


def _operand(words: list[Lanes], kind: str) -> Lanes:
    """Registers as ``[warp, lane * register * element]`` values."""
    raw = np.ascontiguousarray(np.stack(words, 1)).reshape(-1, LANES * len(words))
    if kind == "s8":
        return raw.view(np.int8).astype(np.float32)
    return from_bits(raw.view(np.uint16), "f16" if kind == "f16" else "bf16")


def multiply(a_words: list[Lanes], b_words: list[Lanes], c: Lanes, kind: str) -> Lanes:
    """``D[lane, 4]`` of one mma in every warp; `c` is ``[lane, 4]``."""
    places = _places(4 if kind == "s8" else 2, len(b_words))
    a, b = (_operand(words, kind)[:, at] for words, at in zip((a_words, b_words), places, strict=True))
    product = (a @ b)[:, _ROWS, _COLUMNS].reshape(-1, 4)  # exact for bytes: 32 products are below 2^24
    return np.asarray(c + product.astype(c.dtype))


def _mma(kernel: Kernel, instruction: Instruction) -> Step:
    op = instruction.op
    kind = "s8" if "s8" in op else "f16" if "f16" in op else "bf16" if "bf16" in op else ""
    shapes = {"s8": ("m16n8k32",), "f16": ("m16n8k16", "m16n8k8"), "bf16": ("m16n8k16",)}
    if not kind or not set(shapes[kind]) & set(op) or op[-1] not in ("s32", "f32"):
        raise PtxError(f"not modelled: `{instruction.text}`")
    total: type[Any] = np.int32 if kind == "s8" else np.float32
    stores = [writer(kernel, register) for register in vector(instruction.operands[0])]
    a, b = ([reader(kernel, r, np.uint32) for r in vector(operand)] for operand in instruction.operands[1:3])
    c = [reader(kernel, r, total) for r in vector(instruction.operands[3])]

    def step(warp: Warp, mask: Mask) -> None:
        warp.together(mask, "mma")
        start = np.stack([read(warp) for read in c], 1)
        result = multiply([read(warp) for read in a], [read(warp) for read in b], start, kind)
        for i, store in enumerate(stores):
            store(warp, np.ascontiguousarray(result[:, i]), mask)

    return step


def _load_matrix(kernel: Kernel, instruction: Instruction) -> Step:
    if "x4" not in instruction.op or "trans" in instruction.op:
        raise PtxError(f"not modelled: `{instruction.text}`")
    pointer = pointer_of(kernel, instruction.operands[1])
    stores = [writer(kernel, register) for register in vector(instruction.operands[0])]

    def step(warp: Warp, mask: Mask) -> None:
        warp.together(mask, "ldmatrix")
        lanes = warp.lanes_of(mask)
        rows = np.zeros((warp.lanes.size, 16), np.uint8)
        rows[lanes] = warp.blocks.shared.read(pointer(warp)[lanes], 16, warp.index, warp.slot[lanes])
        words = rows.view(np.uint32).reshape(-1, LANES, 4)  # [warp, row of all matrices, 4]
        for matrix, store in enumerate(stores):
            store(warp, words[:, matrix * 8 + GROUP, PAIR].reshape(-1), mask)

    return step


def _shuffle(kernel: Kernel, instruction: Instruction) -> Step:
    if "bfly" not in instruction.op:
        raise PtxError(f"not modelled: `{instruction.text}`")
    store = writer(kernel, instruction.operands[0].split("|")[0])
    value, distance = (reader(kernel, operand, np.uint32) for operand in instruction.operands[1:3])

    def step(warp: Warp, mask: Mask) -> None:
        warp.together(mask, "shfl")
        store(warp, value(warp)[warp.lanes ^ distance(warp)], mask)

    return step


def _vote(kernel: Kernel, instruction: Instruction) -> Step:
    if "ballot" not in instruction.op:
        raise PtxError(f"not modelled: `{instruction.text}`")
    store = writer(kernel, instruction.operands[0])
    value = reader(kernel, instruction.operands[1].lstrip("!"), np.bool_)
    negated = instruction.operands[1].startswith("!")

    def step(warp: Warp, mask: Mask) -> None:
        warp.together(mask, "vote")
        votes = value(warp) ^ negated
        words = (votes.reshape(-1, LANES).astype(np.int64) << LANE).sum(axis=1).astype(np.uint32)
        store(warp, np.repeat(words, LANES), mask)

    return step


_COLLECTIVES = {"mma": _mma, "ldmatrix": _load_matrix, "shfl": _shuffle, "vote": _vote}


def collective(kernel: Kernel, instruction: Instruction) -> Step | None:
    """The step of a warp-wide instruction, or None when it is something else."""
    make = _COLLECTIVES.get(instruction.op[0])
    return make(kernel, instruction) if make else None
