"""Arithmetic of the PTX instructions that our kernels use, each as a function of its operands' lanes.

The compiler computes ahead of branches, with registers that were not written yet and whose results nobody uses. So what
is computed of such a register counts as not written either; stores, addresses, branches and collectives report it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from emulator.ptx_text import TYPES, Instruction, Kernel, PtxError, vector
from emulator.ptx_warp import Lanes, Mask, Warp, reader, writer
from prepack.floats import Dtype, from_bits, to_bits

Step = Callable[[Warp, Mask], None]

_SHARED_WINDOW = np.uint64(1 << 24)  # where shared memory is among generic addresses; only compared with null

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "geu": lambda a, b: np.logical_not(np.less(a, b)),  # true where one is not a number
}  # fmt: skip


def _divide(a: Lanes, b: Lanes) -> Lanes:
    """Integer division toward zero."""
    wide_a, wide_b = a.astype(np.int64), np.where(b == 0, 1, b.astype(np.int64))
    return np.asarray(np.sign(wide_a) * np.sign(wide_b) * (np.abs(wide_a) // np.abs(wide_b)))


def _reciprocal(values: Lanes) -> Lanes:
    """`rcp.approx.ftz`, as wrong as it may be: a unit in the last place more or less."""
    least = np.finfo(np.float32).tiny
    exact = np.float32(1) / np.where(np.abs(values) < least, np.copysign(np.float32(0), values), values)
    off = (values.view(np.uint32) % 3).astype(np.int32) - 1
    near = (exact.view(np.int32) + off).view(np.float32)
    usual = np.isfinite(exact) & (np.abs(exact) > 2 * least)
    flushed = np.where(np.abs(exact) < least, np.copysign(np.float32(0), exact), exact)
    return np.asarray(np.where(usual, near, flushed))


def _shift(values: Lanes, amount: Lanes, *, left: bool) -> Lanes:
    """Amounts of the register's width or more push everything out (or leave the sign)."""
    bits = values.dtype.itemsize * 8
    clipped = np.minimum(amount, bits - 1).astype(values.dtype)
    shifted = values << clipped if left else values >> clipped
    emptied = np.zeros_like(values) if left or values.dtype.kind == "u" else shifted
    return np.where(amount >= bits, emptied, shifted)


def _permute(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    pool = np.stack([a, b], 1).view(np.uint8).reshape(-1, 8)
    out = np.zeros((len(a), 4), np.uint8)
    for byte in range(4):
        pick = (selector >> np.uint32(4 * byte)) & np.uint32(15)
        value = pool[np.arange(len(a)), pick & 7]
        out[:, byte] = np.where(pick & 8, np.where(value & 0x80, 0xFF, 0), value)
    return out.view(np.uint32).reshape(-1)


def _insert(source: Lanes, into: Lanes, position: Lanes, length: Lanes) -> Lanes:
    mask = (((1 << length.astype(np.int64)) - 1) << position.astype(np.int64)).astype(np.uint32)
    moved = (source.astype(np.uint64) << position.astype(np.uint64)).astype(np.uint32)
    return np.asarray((into & ~mask) | (moved & mask))


def _lookup(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
    out = np.zeros_like(a)
    for row in range(8):
        if int(table[0]) >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def _funnel(low: Lanes, high: Lanes, amount: Lanes, *, left: bool) -> Lanes:
    """`shf.wrap`: the half of ``high:low`` that a shift by `amount` modulo 32 leaves."""
    joined = (high.astype(np.uint64) << np.uint64(32)) | low
    by = (amount & np.uint32(31)).astype(np.uint64)
    moved = (joined << by) >> np.uint64(32) if left else joined >> by
    return np.asarray((moved & np.uint64(0xFFFFFFFF)).astype(np.uint32))


def _halves(word: Lanes, kind: str) -> Lanes:
    """Two packed values as float32 ``[lanes, 2]``."""
    bits = np.stack([word & np.uint32(0xFFFF), word >> np.uint32(16)], 1).astype(np.uint16)
    return from_bits(np.ascontiguousarray(bits), "f16" if kind == "f16x2" else "bf16")


def _join(values: Lanes, kind: str) -> Lanes:
    bits = to_bits(values, "f16" if kind == "f16x2" else "bf16").astype(np.uint32)
    return np.asarray(bits[:, 0] | (bits[:, 1] << np.uint32(16)))


def _convert(instruction: Instruction) -> Callable[[Lanes], Lanes]:
    """`cvt`: the opcode names the target type, then the source type."""
    kinds = [part for part in instruction.op if part in TYPES or part in ("f16", "bf16")]
    target, source = kinds[0], kinds[1]
    if source in ("f16", "bf16"):
        half: Dtype = "f16" if source == "f16" else "bf16"
        return lambda v: from_bits(np.ascontiguousarray(v), half)
    if target in ("f16", "bf16"):
        return lambda v: to_bits(v, target)  # type: ignore[arg-type] # a Literal, checked above
    if source == "f32" and target == "s32":
        if "rni" not in instruction.op:
            raise PtxError(f"rounding of `{instruction.text}`")
        return lambda v: np.clip(np.nan_to_num(np.rint(v.astype(np.float64))), -(2**31), 2**31 - 1).astype(np.int32)
    return lambda v: v.astype(TYPES[target])


def _wide(instruction: Instruction) -> Callable[[Lanes, Lanes], Lanes]:
    kind = np.dtype(instruction.type)
    double = f"{kind.kind}{kind.itemsize * 2}"
    return lambda a, b: a.astype(double) * b.astype(double)


# on float32, which holds both results exactly, so that _join rounds once
_HALVES: dict[str, Callable[[Any, Any], Any]] = {"sub": np.subtract, "mul": np.multiply}


def _fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    return np.asarray(a.astype(np.float64) * b + c)


def function(instruction: Instruction) -> tuple[Callable[..., Lanes], list[type[Any]]] | None:
    """What the instruction computes and the types of its sources; None for what is not arithmetic."""
    op, kind = instruction.op[0], instruction.op[-1]
    if op == "cvt":
        if kind == "f32" and instruction.op[-2] in ("f16x2", "bf16x2"):
            packed = instruction.op[-2]
            return (lambda hi, lo: _join(np.stack([lo, hi], 1), packed)), [np.float32, np.float32]
        source = np.uint16 if kind in ("f16", "bf16") else TYPES[kind]
        return _convert(instruction), [source]
    if op == "fma" and kind == "f16x2":  # _join rounds to float32 on the way, which holds the sums of our kernels
        return (lambda a, b, c: _join(_fused(*(_halves(each, kind) for each in (a, b, c))), kind)), [np.uint32] * 3
    if op == "neg" and kind == "f16x2":
        return (lambda a: a ^ np.uint32(0x80008000)), [np.uint32]
    if op in _HALVES and kind == "f16x2":
        return (lambda a, b: _join(_HALVES[op](_halves(a, kind), _halves(b, kind)), kind)), [np.uint32] * 2
    t = instruction.type
    table: dict[str, tuple[Callable[..., Any], list[type[Any]]]] = {
        "mov": (lambda a: a, [t]),
        "cvta": ((lambda a: a) if "to" in instruction.op else (lambda a: a + _SHARED_WINDOW), [t]),
        "add": (np.add, [t, t]),
        "sub": (np.subtract, [t, t]),
        "and": (np.bitwise_and, [t, t]),
        "or": (np.bitwise_or, [t, t]),
        "xor": (np.bitwise_xor, [t, t]),
        "not": (np.invert, [t]),
        "neg": (np.negative, [t]),
        "abs": (np.abs, [t]),
        "min": (np.fmin, [t, t]),
        "max": (np.fmax, [t, t]),
        "div": (np.divide if t is np.float32 else _divide, [t, t]),
        "rem": (lambda a, b: a.astype(np.int64) - _divide(a, b) * b.astype(np.int64), [t, t]),
        "mul": (_wide(instruction) if "wide" in instruction.op else np.multiply, [t, t]),
        "rcp": (_reciprocal, [t]),
        "mad": (lambda a, b, c: a * b + c, [t, t, t]),
        "fma": (_fma, [t, t, t]),
        "shl": (lambda v, n: _shift(v, n, left=True), [t, np.uint32]),
        "shr": (lambda v, n: _shift(v, n, left=False), [t, np.uint32]),
        "shf": (lambda a, b, n: _funnel(a, b, n, left="l" in instruction.op), [np.uint32] * 3),
        "popc": (lambda v: np.bitwise_count(v).astype(np.uint32), [t]),
        "prmt": (_permute, [t, t, t]),
        "bfi": (_insert, [t, t, np.uint32, np.uint32]),
        "lop3": (_lookup, [t, t, t, t]),
        "setp": (_COMPARE.get(instruction.op[1], np.equal), [t, t]),
    }
    unknown = {
        "shf": "wrap" not in instruction.op,
        "mul": "hi" in instruction.op,
        "mad": not {"lo", "f32"} & {*instruction.op},
        "setp": instruction.op[1] not in _COMPARE,
        "cvta": instruction.op[1:-1] not in (("to", "global"), ("shared",)),
        "rcp": instruction.op[1:] != ("approx", "ftz", "f32"),
    }
    if unknown.get(op):
        raise PtxError(f"not modelled: `{instruction.text}`")
    return table.get(op)


def _fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Fused: float64 holds the product exactly."""
    return np.asarray((a.astype(np.float64) * b + c).astype(a.dtype))


def _unwritten(kernel: Kernel, instruction: Instruction) -> Callable[[Warp, Mask, tuple[str, ...]], bool]:
    """Whether one of the operands that are used was not written; then the result is not written either."""
    result = instruction.operands[0]

    def check(warp: Warp, mask: Mask, used: tuple[str, ...]) -> bool:
        if all(operand in warp.registers or operand not in kernel.registers for operand in used):
            return False
        if mask is None:
            warp.registers.pop(result, None)
        return True

    return check


def _select(kernel: Kernel, instruction: Instruction) -> Step:
    """`selp`: a register that no lane chooses need not have been written."""
    kinds: list[type[Any]] = [instruction.type, instruction.type, np.bool_]
    a, b, choice = (reader(kernel, each, kind) for each, kind in zip(instruction.operands[1:], kinds, strict=True))
    store = writer(kernel, instruction.operands[0])
    unwritten = _unwritten(kernel, instruction)

    def step(warp: Warp, mask: Mask) -> None:
        chosen = choice(warp)
        among = chosen if mask is None else chosen[mask]
        used = instruction.operands[1:2] * bool(among.any()) + instruction.operands[2:3] * (not among.all())
        if unwritten(warp, mask, used):
            return
        store(
            warp, a(warp) if among.all() else b(warp) if not among.any() else np.where(chosen, a(warp), b(warp)), mask
        )

    return step


def _repack(kernel: Kernel, instruction: Instruction) -> Step:
    """`mov` between one register and a vector of narrower ones."""
    size = np.dtype(instruction.type).itemsize
    to, source = vector(instruction.operands[0]), vector(instruction.operands[1])
    part = np.dtype(f"u{size // max(len(to), len(source))}").type
    stores = [writer(kernel, register) for register in to]
    fetch = [reader(kernel, register, part if len(source) > 1 else instruction.type) for register in source]

    def step(warp: Warp, mask: Mask) -> None:
        joined = np.ascontiguousarray(np.stack([read(warp) for read in fetch], 1))
        values = joined.view(part if len(to) > 1 else instruction.type)
        for i, store in enumerate(stores):
            store(warp, np.ascontiguousarray(values[:, i]), mask)

    return step


_INTEGER_RESULT = {"div", "rem"}


def arithmetic(kernel: Kernel, instruction: Instruction) -> Step | None:
    """The step of an arithmetic instruction, or None when it is something else."""
    if instruction.op[0] == "mov" and any(operand.startswith("{") for operand in instruction.operands):
        return _repack(kernel, instruction)
    if instruction.op[0] == "selp":
        return _select(kernel, instruction)
    found = function(instruction)
    if found is None:
        return None
    compute, types = found
    if len(instruction.operands) != len(types) + 1 or instruction.operands[0].startswith("{"):
        raise PtxError(f"operands of `{instruction.text}`")
    sources = [reader(kernel, operand, kind) for operand, kind in zip(instruction.operands[1:], types, strict=True)]
    store = writer(kernel, instruction.operands[0])
    cast = instruction.type if instruction.op[0] in _INTEGER_RESULT else None

    unwritten = _unwritten(kernel, instruction)

    def step(warp: Warp, mask: Mask) -> None:
        if unwritten(warp, mask, instruction.operands[1:]):
            return
        result = compute(*(source(warp) for source in sources))
        store(warp, result if cast is None else result.astype(cast), mask)

    return step
