"""Instructions that a whole warp executes together: mma, ldmatrix, shuffles and votes.

Fragment maps: PTX ISA, "Matrix Fragments for mma.m16n8k32", "mma.m16n8k16" and "mma.m16n8k8".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from emulator.ptx_memory_ops import _pointer as pointer_of
from emulator.ptx_ops import Step
from emulator.ptx_text import Instruction, Kernel, PtxError, vector
from emulator.ptx_warp import LANE, LANES, Lanes, Mask, Warp, reader, writer
from prepack.floats import from_bits

GROUP, PAIR = LANE // 4, LANE % 4


def _together(warp: Warp, mask: Mask, what: str) -> None:
    if mask is not None:
        warp.block.report(f"{what}: lanes diverge")


def _operand(words: list[Lanes], kind: str) -> Lanes:
    """Registers as ``[lane, register, element]`` values."""
    raw = np.ascontiguousarray(np.stack(words, 1))
    if kind == "s8":
        return raw.view(np.int8).reshape(LANES, len(words), 4).astype(np.int64)
    bits = raw.view(np.uint16)
    return from_bits(np.ascontiguousarray(bits), "f16" if kind == "f16" else "bf16").reshape(LANES, len(words), 2)


def multiply(a_words: list[Lanes], b_words: list[Lanes], c: Lanes, kind: str) -> Lanes:
    """``D[lane, 4]`` of one mma; `c` is ``[lane, 4]``."""
    width = 4 if kind == "s8" else 2  # elements of one register
    depth = 4 * width * len(b_words)
    number = np.int64 if kind == "s8" else np.float32
    a, b = np.zeros((16, depth), number), np.zeros((depth, 8), number)
    element = np.arange(width)
    a_values, b_values = _operand(a_words, kind), _operand(b_words, kind)
    for register in range(len(a_words)):
        k = PAIR[:, None] * width + element + 4 * width * (register // 2)
        a[(GROUP + 8 * (register % 2))[:, None], k] = a_values[:, register]
    for register in range(len(b_words)):
        k = PAIR[:, None] * width + element + 4 * width * register
        b[k, GROUP[:, None]] = b_values[:, register]
    rows = GROUP[:, None] + 8 * (np.arange(4) // 2)
    columns = PAIR[:, None] * 2 + np.arange(4) % 2
    product = (a @ b)[rows, columns]
    return np.asarray((c.astype(number) + product).astype(c.dtype))


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
        _together(warp, mask, "mma")
        start = np.stack([read(warp) for read in c], 1)
        result = multiply([read(warp) for read in a], [read(warp) for read in b], start, kind)
        for i, store in enumerate(stores):
            store(warp, np.ascontiguousarray(result[:, i]), None)

    return step


def _load_matrix(kernel: Kernel, instruction: Instruction) -> Step:
    if "x4" not in instruction.op or "trans" in instruction.op:
        raise PtxError(f"not modelled: `{instruction.text}`")
    pointer = pointer_of(kernel, instruction.operands[1])
    stores = [writer(kernel, register) for register in vector(instruction.operands[0])]

    def step(warp: Warp, mask: Mask) -> None:
        _together(warp, mask, "ldmatrix")
        rows = warp.block.shared.read(pointer(warp), 16, warp.index)
        words = np.ascontiguousarray(rows).view(np.uint32)  # [row of all matrices, 4]
        for matrix, store in enumerate(stores):
            store(warp, words[matrix * 8 + GROUP, PAIR], None)

    return step


def _shuffle(kernel: Kernel, instruction: Instruction) -> Step:
    if "bfly" not in instruction.op:
        raise PtxError(f"not modelled: `{instruction.text}`")
    store = writer(kernel, instruction.operands[0].split("|")[0])
    value, distance = (reader(kernel, operand, np.uint32) for operand in instruction.operands[1:3])

    def step(warp: Warp, mask: Mask) -> None:
        _together(warp, mask, "shfl")
        store(warp, value(warp)[LANE ^ distance(warp)], None)

    return step


def _vote(kernel: Kernel, instruction: Instruction) -> Step:
    if "ballot" not in instruction.op:
        raise PtxError(f"not modelled: `{instruction.text}`")
    store = writer(kernel, instruction.operands[0])
    value = reader(kernel, instruction.operands[1].lstrip("!"), np.bool_)
    negated = instruction.operands[1].startswith("!")

    def step(warp: Warp, mask: Mask) -> None:
        _together(warp, mask, "vote")
        votes = value(warp) ^ negated
        store(warp, np.full(LANES, int((votes.astype(np.int64) << LANE).sum()), np.uint32), None)

    return step


_COLLECTIVES = {"mma": _mma, "ldmatrix": _load_matrix, "shfl": _shuffle, "vote": _vote}


def collective(kernel: Kernel, instruction: Instruction) -> Step | None:
    """The step of a warp-wide instruction, or None when it is something else."""
    make = _COLLECTIVES.get(instruction.op[0])
    return make(kernel, instruction) if make else None
