"""The launch plan: limits of the chips, number of launches, and refusals that say what to do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.plan import Buffers, PlanError, Planner, Problem, Tactic
from emulator.session import DTYPE_CODE
from prepack.floats import Dtype
from prepack.width import has_3_bit_kernels

SMALLEST_SHARED_BYTES = 99 * 1024  # sm_86, 89 and 120


def problem(**changes: int) -> Problem:
    values = {
        "dtype": 0, "M": 1, "N": 1536, "K": 1536, "act_bits": 8, "group_size": -1, "has_zeros": 0, "has_inv_omega": 1,
        "rank_shared": 32, "rank_routed": 32, "num_experts": 8, "adapter_bits": 16, "weight_bits": 4,
    }  # fmt: skip
    return Problem(**(values | changes))


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.sampled_from([1, 7, 16, 17, 64, 1024, 4096]),
    k=st.sampled_from([128, 1536, 8960, 18944]),
    n=st.sampled_from([256, 2048, 37888]),
    act_bits=st.sampled_from([0, 6, 8]),
    group_size=st.sampled_from([-1, 64, 128]),
    form=st.sampled_from([(0, 4), (1, 4), (0, 3), (1, 3)]),
    rows=st.sampled_from([0, 64, 128]),
)
def test_fits_every_chip(
    planner: Planner, tokens: int, k: int, n: int, act_bits: int, group_size: int, form: tuple[int, int], rows: int
) -> None:
    zeros, bits = form
    bits = bits if has_3_bit_kernels(act_bits, bool(zeros), "f16") else 4
    case = problem(M=tokens, K=k, N=n, act_bits=act_bits, group_size=group_size, has_zeros=zeros, weight_bits=bits)
    if rows == 128 and act_bits == 0:
        with pytest.raises(PlanError, match="block_rows"):
            planner.launches(case, Buffers(), Tactic(rows, 0))
        return
    launches = planner.launches(case, Buffers(), Tactic(rows, 0))
    assert len(launches) == 3
    for launch in launches:
        assert 0 < launch.threads <= 1024 and launch.threads % 32 == 0
        assert launch.grid_x > 0 and 0 < launch.grid_y < 65536
        assert launch.shared_bytes <= SMALLEST_SHARED_BYTES


@pytest.mark.parametrize(
    ("changes", "launches"),
    [
        ({"rank_shared": 0, "rank_routed": 0, "num_experts": 0}, 2),
        ({"rank_shared": 0, "rank_routed": 0, "num_experts": 0, "act_bits": 0, "has_inv_omega": 0}, 2),
        ({"num_experts": 1, "act_bits": 0, "has_inv_omega": 0}, 3),
        ({}, 3),
    ],
)
def test_launches_only_what_is_needed(planner: Planner, changes: dict[str, int], launches: int) -> None:
    assert len(planner.launches(problem(**changes), Buffers(), Tactic())) == launches


BAD = [
    {"dtype": 2}, {"M": 0}, {"M": -5}, {"M": 1 << 21}, {"K": 0}, {"K": 12}, {"K": 1 << 20}, {"N": 12}, {"N": 0},
    {"act_bits": 4}, {"group_size": 32}, {"group_size": 0}, {"K": 1544, "group_size": 128}, {"rank_shared": 129},
    {"rank_routed": -1}, {"num_experts": 17}, {"num_experts": 0}, {"has_zeros": 2}, {"adapter_bits": -1},
    {"adapter_bits": 0}, {"adapter_bits": 1}, {"adapter_bits": 5}, {"adapter_bits": 32},
    {"num_experts": 1, "rank_shared": 128}, {"has_inv_omega": 77}, {"M": 1 << 20, "K": 131072},
    {"weight_bits": 0}, {"weight_bits": 2}, {"weight_bits": 5}, {"weight_bits": -3}, {"weight_bits": 3, "dtype": 1},
    {"weight_bits": 3, "has_zeros": 1}, {"weight_bits": 3, "has_zeros": 1, "act_bits": 6, "group_size": 128},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_refuses_with_a_reason_and_a_remedy(planner: Planner, changes: dict[str, int]) -> None:
    case = problem(**changes)
    why = planner.refusal(case)
    assert why is not None and why.count(". ") == 1 and why.endswith(".")
    assert planner.workspace_bytes(case) == 0
    with pytest.raises(PlanError):
        planner.launches(case, Buffers(), Tactic())


@pytest.mark.parametrize("dtype", DTYPE_CODE)
@pytest.mark.parametrize("group_size", [-1, 64, 128])
@pytest.mark.parametrize("zeros", [0, 1])
@pytest.mark.parametrize("act_bits", [0, 6, 8])
def test_prepack_knows_which_kernels_read_3_bits(
    planner: Planner, act_bits: int, zeros: int, group_size: int, dtype: Dtype
) -> None:
    case = problem(act_bits=act_bits, has_zeros=zeros, group_size=group_size, dtype=DTYPE_CODE[dtype], weight_bits=3)
    assert (planner.refusal(case) is None) == has_3_bit_kernels(act_bits, bool(zeros), dtype)


@pytest.mark.parametrize(
    "tactic", [Tactic(block_rows=32), Tactic(block_rows=192), Tactic(decode_warps=3), Tactic(-64, 0)]
)
def test_refuses_unknown_tactics(planner: Planner, tactic: Tactic) -> None:
    with pytest.raises(PlanError, match="tactic"):
        planner.launches(problem(), Buffers(), tactic)
