"""Compile what the emulators run. Outputs are named by the hash of their inputs, so nothing stale is ever tested."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"


class BuildError(RuntimeError):
    """A compiler is missing or refused the code."""


def _digest(files: Iterable[Path], extra: str) -> str:
    digest = hashlib.sha256(extra.encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> None:
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} is not installed. Run plugins/ladder.sh, which fetches what is missing.")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed. Fix the code:\n{done.stderr[-4000:]}")


def _sources(root: Path) -> list[Path]:
    folders = ("kernels", "include/qe_edge", "host", "emulator")
    return [p for f in folders for p in (root / f).glob("*") if p.suffix in {".cu", ".cuh", ".h", ".cpp"}]


def source_emulator(root: Path = ROOT, *, subset: int = 0) -> Path:
    """The shared library with all kernels, the emulator and the launch plan.

    Args:
        root: a tree like plugins/, for instance a copy with a planted bug.
        subset: only the kernels that the planted-bug tests launch, of 4- or 3-bit weights; 0 for all kernels.
    """
    target = BUILD / f"libqe_emu_{_digest(_sources(root), str(subset))}.so"
    if target.exists():
        return target
    BUILD.mkdir(exist_ok=True)
    work = BUILD / f"objects_{target.stem}_{os.getpid()}"  # two test processes may build at once
    work.mkdir(exist_ok=True)
    define = [f"-DQE_SUBSET={subset}"] if subset else []
    cxx = os.environ.get("CXX", "g++")
    common = [cxx, "-std=c++17", "-fPIC", "-I", str(root / "emulator")]
    # -O1: higher levels duplicate calls, and a warp collective is recognised by the place that calls it.
    kernels = [*common, "-O1", "-DQE_EMULATE", "-fsanitize=thread", "-Wno-tsan", *define]
    _run([*kernels, "-c", str(root / "emulator/entry.cpp"), "-o", str(work / "entry.o")])
    for name in (
        "emulator/simt.cpp",
        "emulator/shadow.cpp",
        "emulator/collectives.cpp",
        "host/plan.cpp",
        "host/self_test.cpp",
    ):
        _run([*common, "-O2", "-Wall", "-Wextra", "-c", str(root / name), "-o", str(work / f"{Path(name).stem}.o")])
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    _run([cxx, "-shared", "-o", str(partial), *map(str, sorted(work.glob("*.o")))])
    partial.replace(target)
    shutil.rmtree(work)
    return target


def plan_library(root: Path = ROOT) -> Path:
    """The shared library with the launch plan alone, for who has a GPU: a second to compile."""
    sources = [*(root / "include/qe_edge").glob("*.h"), root / "host/shape.h", root / "host/plan.cpp"]
    target = BUILD / f"libqe_plan_{_digest(sources, '')}.so"
    if target.exists():
        return target
    BUILD.mkdir(exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    cxx = os.environ.get("CXX", "g++")
    _run([cxx, "-std=c++17", "-fPIC", "-O2", "-shared", "-o", str(partial), str(root / "host/plan.cpp")])
    partial.replace(target)
    return target


def ptx(root: Path = ROOT, *, subset: int = 0, nvcc: str | None = None) -> Path:
    """The compute_80 PTX that every cubin is assembled from."""
    compiler = nvcc or os.environ.get("NVCC", "nvcc")
    target = BUILD / f"kernels_{_digest(_sources(root), f'{subset}{compiler}')}.ptx"
    if target.exists():
        return target
    BUILD.mkdir(exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    define = [f"-DQE_SUBSET={subset}"] if subset else []
    _run([compiler, "-O3", "-std=c++17", "-arch=compute_80", "-ptx", *define, "-o", str(partial),
          str(root / "kernels/kernels.cu")])  # fmt: skip
    partial.replace(target)
    return target


if __name__ == "__main__":
    for kernels in (0, 4, 3):
        print(source_emulator(subset=kernels))
        print(ptx(subset=kernels))
