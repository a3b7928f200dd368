"""Rungs 5 and 6: every chip assembles, and every kernel keeps its limits."""

from __future__ import annotations

import pytest

from emulator.build import ptx
from emulator.ptx_text import PtxFile
from gates.assemble import CHIPS, assemble, disassemble
from gates.limits import broken, loop_of
from gates.loops import hot_loop


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_keeps_its_limits(chip: str) -> None:
    cubin = assemble(chip)
    code = disassemble(cubin)
    names = PtxFile(ptx().read_text()).names
    assert sorted(cubin.usage) == sorted(code) == sorted(names)
    assert [line for name in names for line in broken(cubin, name, loop_of(name, code[name]))] == []


def test_a_loop_without_matrix_instructions_is_noticed() -> None:
    with pytest.raises(ValueError, match="no loop"):
        hot_loop(["0000 MOV R1, R2", "0010 IADD3 R1, R1, 0x1, RZ", "0020 @P0 BRA 0x0"])
