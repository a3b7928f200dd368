"""Rungs 5 and 6: the code that ships for every chip keeps its limits."""

from __future__ import annotations

import json

import pytest

from emulator.build import PTX_OPTIONS, ROOT, ptx
from gates.costs import EDGE_LLM, chip_costs
from gates.cubins import CHIPS, PLUGIN_BUILD, cubin, disassemble, names_for
from gates.limits import broken, loop_of, register_limit
from gates.loops import hot_loop

STORED = json.loads((ROOT.parent / "qe_edge/predict/instructions.json").read_text(encoding="utf-8"))


def test_the_verified_ptx_is_the_one_that_ships() -> None:
    assert (PLUGIN_BUILD / "kernels.ptx").read_bytes() == ptx().read_bytes()
    # the ladder hands the emulator's to CMake; elsewhere CMake makes it, with the same options
    assert f"COMMAND ${{QE_NVCC}} {' '.join(PTX_OPTIONS)} -o ${{QE_PTX}}" in (ROOT / "cmake/payload.cmake").read_text()


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_keeps_its_limits(chip: str) -> None:
    shipped = cubin(chip)
    code = disassemble(shipped)
    names = names_for(chip, ptx())
    assert sorted(shipped.usage) == sorted(code) == sorted(names)
    assert [line for name in names for line in broken(shipped, name, loop_of(name, code[name]))] == []
    # after a change of the kernels: python benchmarks/kernel_static.py --write qe_edge/predict/instructions.json
    assert {phase: STORED[phase][chip] for phase in ("prefill_per_1000_mac", "decode_per_kib")} == chip_costs(
        shipped, code
    )
    assert STORED["edge_llm"] == EDGE_LLM


@pytest.mark.parametrize("chip", CHIPS[:5])
def test_cuda_12_has_every_kernel_and_spills_nothing(chip: str) -> None:
    """The payload of JetPack 6, assembled by CUDA 12.6 from the same PTX."""
    usage = cubin(chip, cuda=12).usage
    assert sorted(usage) == sorted(names_for(chip, ptx()))
    assert {name for name, used in usage.items() if used.local_bytes or used.stack_bytes} == set()
    assert {name for name, used in usage.items() if used.registers > register_limit(name)} == set()


def test_what_comes_once_in_a_part_of_k_is_no_cost_of_the_loop() -> None:
    """A branch skips five instructions with a loop of their own; one that skips none of these is counted."""
    usual = [*["IMMA.16832.S8.S8 R0, R4.ROW, R8.COL, R0"] * 8, *["LDGSTS.E.BYPASS.128 [R1], desc[UR2][R2.64]"] * 4]
    bodies = [
        *usual,
        "@P0 BRA 0x120",  # at 0xc0
        "MOV R1, R2",
        "IADD3 R1, R1, 0x1, RZ",  # at 0xe0
        "@P1 BRA 0xe0",
        "MOV R1, R2",
        "MOV R1, R2",
        "@P2 BRA 0x140",  # at 0x120
        "MOV R1, R2",
        "@P3 BRA 0x0",  # at 0x140
    ]
    loop = hot_loop([f"{16 * i:04x} {body}" for i, body in enumerate(bodies)])
    assert (loop.instructions, loop.imma, loop.async_copies) == (len(bodies) - 5, 8, 4)


def test_a_loop_without_matrix_instructions_is_noticed() -> None:
    with pytest.raises(ValueError, match="no loop"):
        hot_loop(["0000 MOV R1, R2", "0010 IADD3 R1, R1, 0x1, RZ", "0020 @P0 BRA 0x0"])
