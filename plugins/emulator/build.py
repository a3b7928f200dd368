"""Compile what the emulators run. Outputs are named by the hash of their inputs, so nothing stale is ever tested."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PTX_OPTIONS = ("-O3", "-std=c++17", "-arch=compute_80", "-ptx")


class BuildError(RuntimeError):
    """A compiler is missing or refused the code."""


def _cxx() -> str:
    return os.environ.get("CXX", "g++")


def _digest(files: Iterable[Path], compiler: str) -> str:
    digest = hashlib.sha256(compiler.encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        raise BuildError(f"{command[0]} is not installed. Run plugins/ladder.sh, which fetches what is missing.")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed. Fix the code:\n{done.stderr[-4000:]}")
    return done.stdout


def _make(target: Path, command: list[str]) -> Path:
    """Run a compiler whose output is the target, if there is none; two test processes may build at once."""
    if not target.exists():
        BUILD.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        _run([*command, "-o", str(partial)])
        partial.replace(target)
    return target


def _sources(root: Path, *folders: str) -> list[Path]:
    code = [p for f in folders for p in (root / f).glob("*") if p.suffix in {".cu", ".cuh", ".h", ".cpp"}]
    return [*code, Path(__file__)]  # which holds the compilers' options


def keep_kernels(root: Path, wanted: Callable[[str], bool]) -> None:
    """Leave the kernels with the wanted names in a copy of plugins/, because compiling all of them takes a minute."""
    path = root / "kernels/kernel_list.h"
    kernels = re.finditer(r"QE_[A-Z_]+\((qe_\w+)[^)]*\)", _run([_cxx(), "-E", "-P", "-x", "c++", str(path)]))
    path.write_text("".join(f"{kernel.group()}\n" for kernel in kernels if wanted(kernel.group(1))))


def source_emulator(root: Path = ROOT) -> Path:
    """The shared library with the kernels, the emulator and the launch plan of a tree like plugins/."""
    every = _sources(root, "kernels", "include/qe_edge", "host", "emulator")
    target = BUILD / f"libqe_emu_{_digest(every, _cxx())}.so"
    if target.exists():
        return target
    emulator, host = _sources(root, "emulator"), _sources(root, "host", "include/qe_edge")
    plain = ["-O3", "-Wall", "-Wextra"]
    objects = [
        # -O1: higher levels duplicate calls, and a warp collective is recognised by the place that calls it.
        _object(root / "emulator/entry.cpp", every, ["-O1", "-DQE_EMULATE", "-fsanitize=thread", "-Wno-tsan"]),
        *(
            _object(root / f"emulator/{name}.cpp", emulator, [*plain, "-fvisibility=hidden"])
            for name in ("simt", "meet", "fiber", "shadow", "boxes", "collectives")
        ),
        *(_object(root / f"host/{name}.cpp", host, plain) for name in ("plan", "self_test")),
    ]
    return _make(target, [_cxx(), "-shared", *map(str, objects)])


def _object(source: Path, inputs: list[Path], options: list[str]) -> Path:
    """One compiled file. A tree whose kernels differ finds the emulator's own files compiled already."""
    # Without F16C every conversion of a half is a call into libgcc, a third of all time.
    halves = ["-mf16c"] if platform.machine() == "x86_64" else []
    return _make(
        BUILD / f"{source.stem}_{_digest(inputs, _cxx())}.o",
        [_cxx(), "-std=c++17", "-fPIC", *halves, "-I", str(source.parent), *options, "-c", str(source)],
    )


def plan_library(root: Path = ROOT) -> Path:
    """The shared library with the launch plan alone, for who has a GPU: a second to compile."""
    sources = [*(root / "include/qe_edge").glob("*.h"), root / "host/shape.h", root / "host/plan.cpp"]
    return _make(
        BUILD / f"libqe_plan_{_digest(sources, _cxx())}.so",
        [_cxx(), "-std=c++17", "-fPIC", "-O2", "-shared", str(root / "host/plan.cpp")],
    )


def ptx(root: Path = ROOT, *, nvcc: str | None = None) -> Path:
    """The compute_80 PTX that every cubin is assembled from."""
    compiler = nvcc or os.environ.get("NVCC", "nvcc")
    sources = _sources(root, "kernels", "include/qe_edge")
    return _make(
        BUILD / f"kernels_{_digest(sources, compiler)}.ptx",
        [compiler, *PTX_OPTIONS, str(root / "kernels/kernels.cu")],
    )


if __name__ == "__main__":
    with ThreadPoolExecutor() as pool:
        for built in pool.map(lambda build: build(), (source_emulator, ptx)):
            print(built)
