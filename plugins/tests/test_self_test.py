"""Rung 8 without a device: the self-test that the plugin runs on first use passes on the emulator, and can fail."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from emulator.build import ROOT, keep_kernels, source_emulator


def self_test(library: Path, *, clusters: bool = False) -> str | None:
    function = ctypes.CDLL(str(library)).qe_emu_self_test
    function.restype = ctypes.c_char_p
    why: bytes | None = function(ctypes.c_int(clusters))
    return None if why is None else why.decode()


@pytest.mark.parametrize("clusters", [False, True])
def test_passes_on_right_kernels(clusters: bool) -> None:
    assert self_test(source_emulator(), clusters=clusters) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (": w & 0xF0F0F0F0u;", ": w & 0xE0F0F0F0u;"),
        # a GPU whose tensor cores take subnormal fp16 numbers for zero
        ("r[0] = w & 0x000F000Fu;", "r[0] = 0u;"),
        ("0xD480D480u);", "0xD440D440u);"),  # INT4 factors
        ("& 0x00070007u;", "& 0x00030003u;"),  # the code of 3-bit weights that spare bits make
    ],
)
def test_notices_wrong_kernels(before: str, after: str, tmp_path: Path) -> None:
    root = tmp_path / "plugins"
    for folder in ("kernels", "include", "host", "emulator"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = root / "kernels/unpack.cuh"
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))
    keep_kernels(root, lambda kernel: kernel.endswith("_f16"))  # the self-test's type
    assert "wrong results" in (self_test(source_emulator(root)) or "")
