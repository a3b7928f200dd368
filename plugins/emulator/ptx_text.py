"""Parse the PTX that nvcc emits for our kernels. Only what it emits: an unknown construct is an error, not a guess."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class PtxError(RuntimeError):
    """The PTX holds something that this emulator does not model. Extend emulator/ptx_ops.py."""


REGISTER_TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64, "f32": np.float32,
}  # fmt: skip

TYPES: dict[str, type[Any]] = {
    "u8": np.uint8, "b8": np.uint8, "s8": np.int8, "u16": np.uint16, "b16": np.uint16, "s16": np.int16,
    "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32, "u64": np.uint64, "b64": np.uint64,
    "s64": np.int64, "pred": np.bool_, "f16x2": np.uint32, "bf16x2": np.uint32,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One statement: ``@guard op operands``."""

    text: str
    op: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None
    guard_negated: bool = False

    @property
    def type(self) -> type[Any]:
        """The type that the last part of the opcode names."""
        try:
            return TYPES[self.op[-1]]
        except KeyError:
            raise PtxError(f"no type in `{self.text}`") from None


@dataclass
class Kernel:
    """One entry: its instructions, where its labels point, and the types of its registers."""

    name: str
    parameter: str
    parameter_bytes: int
    registers: dict[str, type[np.generic]]
    symbols: frozenset[str]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def needs_clocks(self) -> bool:
        """Whether it has clusters, boxes or groups of warps, where epochs of a block do not say what is in order."""
        return any(
            "cluster" in instruction.op
            or instruction.op[0] == "mbarrier"
            or (instruction.op == ("bar", "sync") and instruction.operands != ("0",))
            for instruction in self.code
        )


CLUSTER_KERNELS = "qe_cluster_"  # names of kernels that only chips from 9.0 on have begin so
_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\(\s*\.param\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\]\s*\)(.*?)\n\}", re.S)
_SHARED = re.compile(r"\.extern\s+\.shared\s+[^;]*?(\w+)\[\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>\s*;")
_LABEL = re.compile(r"^\s*(\$\w+):", re.M)
# Around what makes a generic address of a shared one, or in our own asm statements.
_SCOPE = re.compile(r"\{\s*\.reg \.(\w+) (%?\w+);((?:[^{}]|\{[^{}]*\})*)\}")
_DIRECTIVE = re.compile(r"^\s*\.(maxntid|minnctapersm|maxnreg|pragma)[^\n]*$", re.M)


class PtxFile:
    """The entries of a PTX file, each parsed when it is first asked for.

    Args:
        text: of the file.
        sm_90: as cmake/sm_90.cmake writes it for chips from 9.0 on, with the instructions that comments hold. Else as
            cmake/below_90.cmake writes it, without the kernels of clusters.
    """

    def __init__(self, text: str, *, sm_90: bool = False) -> None:
        if sm_90:
            text = text.replace("// sm_90: ", "")
        text = re.sub(r"//[^\n]*", "", text)
        self._symbols = frozenset(_SHARED.findall(text))
        entries = {match.group(1): match for match in _ENTRY.finditer(text)}
        self._entries = {name: entries[name] for name in entries if sm_90 or not name.startswith(CLUSTER_KERNELS)}
        self._parsed: dict[str, Kernel] = {}

    @property
    def names(self) -> list[str]:
        """The names of all entries."""
        return list(self._entries)

    def kernel(self, name: str) -> Kernel:
        """Raises PtxError when the file has no such entry."""
        if name not in self._entries:
            raise PtxError(f"no kernel {name} in the PTX")
        if name not in self._parsed:
            self._parsed[name] = _kernel(self._entries[name], self._symbols)
        return self._parsed[name]


def _kernel(match: re.Match[str], symbols: frozenset[str]) -> Kernel:
    name, parameter, size, body = match.groups()
    registers = {
        f"{prefix}{i}": REGISTER_TYPES[kind]
        for kind, prefix, count in _REGISTERS.findall(body)
        for i in range(int(count))
    } | {name: REGISTER_TYPES[kind] for kind, name, _ in _SCOPE.findall(body)}
    kernel = Kernel(name, parameter, int(size), registers, symbols)
    body = _DIRECTIVE.sub("", _REGISTERS.sub("", _SCOPE.sub(r"\3", body))).replace("{\n", "\n", 1)
    for piece in _LABEL.sub(r"\1:;", body).split(";"):
        statement = " ".join(piece.split())
        if statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.code)
        elif statement:
            kernel.code.append(_instruction(statement))
    return kernel


def _instruction(statement: str) -> Instruction:
    guard = re.match(r"@(!?)(%\w+) (.*)", statement)
    rest = guard.group(3) if guard else statement
    op, _, operands = rest.partition(" ")
    return Instruction(
        text=statement,
        op=tuple(op.replace("::", ".").split(".")),
        operands=tuple(_split(operands)),
        guard=guard.group(2) if guard else None,
        guard_negated=bool(guard and guard.group(1)),
    )


def _split(operands: str) -> list[str]:
    """Cut at commas outside of braces and brackets."""
    pieces, depth, current = [], 0, ""
    for character in operands:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += character
    return [*pieces, current.strip()] if current.strip() else pieces


def vector(operand: str) -> list[str]:
    """The registers of ``{%r1, %r2}``, or the one register."""
    return [piece.strip() for piece in operand.strip("{}").split(",")]


def address(operand: str) -> tuple[str, int]:
    """Base and offset of ``[%rd1+16]``."""
    base, _, offset = operand.strip("[]").replace(" ", "").partition("+")
    return base, int(offset, 0) if offset else 0
