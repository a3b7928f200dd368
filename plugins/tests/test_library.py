"""What ships: symbols, dependencies, sanitizers, for both architectures."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from emulator.build import ROOT

FOLDERS = {"x86_64": "build/plugin", "aarch64": "build/plugin-aarch64"}
ALLOWED = {"libc.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2",
           "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip
NEWEST_GLIBC, NEWEST_GLIBCXX = (2, 35), (3, 4, 30)  # JetPack 6.2 is Ubuntu 22.04
FUZZ_CASES = 10_000


def read(library: Path, *options: str) -> str:
    assert library.exists(), f"{library} is missing. Run plugins/ladder.sh, which builds it."
    return subprocess.run(["readelf", "-W", *options, str(library)], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["libqe_plugin.so", "libqe_ort.so"])
@pytest.mark.parametrize("machine", FOLDERS)
def test_needs_nothing_that_a_jetson_lacks(machine: str, name: str) -> None:
    library = ROOT / FOLDERS[machine] / name
    header = read(library, "-h")
    assert ("AArch64" if machine == "aarch64" else "X86-64") in header
    assert set(re.findall(r"NEEDED.*\[(.+?)\]", read(library, "-d"))) <= ALLOWED
    versions = read(library, "-V")
    for prefix, newest in (("GLIBC", NEWEST_GLIBC), ("GLIBCXX", NEWEST_GLIBCXX)):
        for text in re.findall(rf"\b{prefix}_([\d.]+)", versions):
            assert tuple(map(int, text.split("."))) <= newest, f"{prefix}_{text}"


@pytest.mark.parametrize("machine", FOLDERS)
def test_exports_only_what_others_look_up(machine: str) -> None:
    symbols = read(ROOT / FOLDERS[machine] / "libqe_plugin.so", "--dyn-syms")
    rows = [line.split() for line in symbols.splitlines() if " GLOBAL " in line or " WEAK " in line]
    assert {row[7].split("@")[0] for row in rows if row[6] != "UND"} == {
        *("getCreators", "setLoggerFinder"),  # TensorRT
        *("QeCheckKernels", "QeLayerMemory", "QeRunLayer"),  # PyTorch
        *("QeLayoutVersion", "QeOpenLayer", "QeRunOpenLayer", "QeCloseLayer"),  # ONNX Runtime
    }


@pytest.mark.parametrize("machine", FOLDERS)
def test_the_operators_library_is_small_and_exports_what_onnx_runtime_looks_up(machine: str) -> None:
    library = ROOT / FOLDERS[machine] / "libqe_ort.so"
    rows = [line.split() for line in read(library, "--dyn-syms").splitlines() if " GLOBAL " in line]
    assert {row[7].split("@")[0] for row in rows if row[6] != "UND"} == {"RegisterCustomOps"}
    assert library.stat().st_size < 1 << 18  # the kernels are in libqe_plugin.so


@pytest.mark.parametrize("machine", FOLDERS)
def test_carries_kernels_for_both_cuda_versions(machine: str) -> None:
    """JetPack 6 has CUDA 12 and JetPack 7 has CUDA 13; the magic number opens every fatbin."""
    library = ROOT / FOLDERS[machine] / "libqe_plugin.so"
    assert library.read_bytes().count(b"\x50\xed\x55\xba") == 2
    assert library.stat().st_size < 20 << 20


@pytest.mark.parametrize("seed", [1, 2])
def test_hostile_fields_end_in_errors(seed: int) -> None:
    program = ROOT / FOLDERS["x86_64"] / "fuzz_plugin"
    assert program.exists(), f"{program} is missing. Run plugins/ladder.sh, which builds it."
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        [str(program), str(FUZZ_CASES), str(seed)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runtime error" not in done.stderr and "AddressSanitizer" not in done.stderr
    assert f"cases {FUZZ_CASES}" in done.stdout
