"""Take the cubins of the built plugin apart: what they use, and their instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from emulator.build import BUILD, BuildError
from emulator.ptx_text import PtxFile

CHIPS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_110", "sm_120")
PLUGIN_BUILD = BUILD / "plugin"


@dataclass(frozen=True)
class Usage:
    """What one kernel takes from its multiprocessor. Spilled registers live in local memory or on the stack."""

    registers: int
    stack_bytes: int
    local_bytes: int


@dataclass(frozen=True)
class Cubin:
    """One chip's code."""

    chip: str
    path: Path
    usage: dict[str, Usage]


def names_for(chip: str, ptx: Path) -> list[str]:
    """The kernels of the shipped PTX that a chip gets: those of clusters from 9.0 on."""
    return PtxFile(ptx.read_text(), sm_90=int(chip.removeprefix("sm_")) >= 90).names


def _run(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} is not installed. Run plugins/ladder.sh, which fetches what is missing.")
    done = subprocess.run(list(command), capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed. Build the plugin again:\n{done.stderr[-4000:]}")
    return done.stdout


_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def cubin(chip: str, cuda: int = 13, folder: Path = PLUGIN_BUILD) -> Cubin:
    """The code that the plugin carries for one chip."""
    path = folder / f"cuda{cuda}_{chip}.cubin"
    if not path.exists():
        raise BuildError(f"{path.name} is missing. Run plugins/ladder.sh, which builds it.")
    text = _run(["cuobjdump", "-res-usage", str(path)])
    usage = {m[0]: Usage(int(m[1]), int(m[2]), int(m[3])) for m in _USAGE.findall(text)}
    return Cubin(chip, path, usage)


def disassemble(code: Cubin) -> dict[str, list[str]]:
    """SASS of every kernel, one string an instruction with its address in front."""
    text = _run(["cuobjdump", "-sass", str(code.path)])
    kernels = {}
    for match in re.finditer(r"Function : (\w+)(.*?)(?=Function : |\Z)", text, re.S):
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", match.group(2))
        kernels[match.group(1)] = [f"{address} {' '.join(body.split())}" for address, body in lines]
    return kernels
