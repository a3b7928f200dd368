"""Assemble the one compute_80 PTX for every chip, and take the result apart again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emulator.build import BUILD, BuildError, ptx

CHIPS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_110", "sm_120")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes from its multiprocessor, as the assembler reports it."""

    registers: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Cubin:
    """One chip's code: usage per kernel, and SASS on request."""

    chip: str
    path: Path
    usage: dict[str, Usage]


def tool(name: str) -> str:
    """The path of a CUDA tool: next to nvcc, or on PATH. Raises BuildError when it is missing."""
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("QE_CUDA_BIN", ""), os.environ.get("PATH", "")]))
    if found is None:
        raise BuildError(f"{name} is not installed. Run plugins/ladder.sh, which fetches what is missing.")
    return found


def run(command: Sequence[str]) -> tuple[str, str]:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed. Fix the code:\n{done.stderr[-4000:]}")
    return done.stdout, done.stderr


def assemble(chip: str) -> Cubin:
    """Assemble for one chip; the result is kept beside the PTX that it came from."""
    source = ptx()
    target = BUILD / f"{source.stem}.{chip}.cubin"
    log = target.with_suffix(".log")
    if not (target.exists() and log.exists()):
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        _, report = run([tool("ptxas"), "-O3", f"-arch={chip}", "-v", str(source), "-o", str(partial)])
        log.write_text(report)
        partial.replace(target)
    return Cubin(chip, target, _usage(log.read_text()))


_KERNEL = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


def _usage(log: str) -> dict[str, Usage]:
    return {
        name: Usage(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in _KERNEL.findall(log)
    }


def disassemble(cubin: Cubin) -> dict[str, list[str]]:
    """SASS of every kernel, one string an instruction with its address in front."""
    text, _ = run([tool("cuobjdump"), "-sass", str(cubin.path)])
    code = {}
    for match in re.finditer(r"Function : (\w+)(.*?)(?=Function : |\Z)", text, re.S):
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", match.group(2))
        code[match.group(1)] = [f"{address} {' '.join(body.split())}" for address, body in lines]
    return code
