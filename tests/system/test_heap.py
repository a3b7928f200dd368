"""What the heap keeps for the next array, and gives back."""

from __future__ import annotations

import platform
import subprocess
import sys
from textwrap import dedent

import pytest

from qe_edge.system.heap import reused_memory, trim_heap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@glibc
def test_memory_is_kept_for_the_next_array_while_the_context_is_open() -> None:
    """In a process of its own: glibc maps less the more it has freed, and tests before this one freed a lot."""
    program = """
        import resource
        from pathlib import Path

        from qe_edge.system.heap import reused_memory

        SIZE = 64 << 20  # bytes, far above what glibc keeps by itself

        def new_pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(3):
                bytearray(SIZE)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        mapped, before = new_pages(), resident()
        with reused_memory():
            new_pages()
            kept, held = new_pages(), resident()
        assert kept < mapped / 10, (kept, mapped)
        assert held > before + SIZE // 2, (held, before)
        assert resident() < before + SIZE // 2, (resident(), before)
        assert new_pages() > mapped / 2, mapped
        large, after = bytearray(SIZE), bytearray(100_000)
        del large  # below what lives, and still given back: it was mapped
        assert resident() < before + SIZE // 2, (resident(), before)
    """
    found = subprocess.run([sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_trimming_needs_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "other")
    trim_heap()
    with reused_memory():
        assert bytearray(3) == b"\0\0\0"
