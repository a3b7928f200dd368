"""`qe-edge predict` times the launches that the plugin plans: as many, with the same grids."""

from __future__ import annotations

import pytest
from qe_edge.predict.kernels import Correction, Problem, plugin_kernels
from qe_edge.predict.shapes import Linear
from qe_edge.predict.tables import get_device, instruction_table, timing_table

from emulator.plan import Buffers, Planner, Tactic
from tests.test_plan import problem

CORRECTIONS = [(0, 0, 0, 16), (64, 0, 0, 4), (64, 32, 8, 16), (32, 32, 1, 8), (0, 16, 4, 8), (24, 8, 2, 16)]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 64, 100, 1024])
def test_grids(planner: Planner, tokens: int, correction: tuple[int, int, int, int]) -> None:
    shared, routed, experts, bits = correction
    for k, n in ((1536, 2048), (8960, 1536), (264, 72), (18944, 3584)):
        planned = planner.launches(
            problem(M=tokens, K=k, N=n, rank_shared=shared, rank_routed=routed, num_experts=experts, adapter_bits=bits),
            Buffers(),
            Tactic(),
        )
        timed = plugin_kernels(
            Problem(Linear(k, (n,)), tokens, "s8_c", Correction(*correction), k * n / 2),
            get_device("orin-agx"), instruction_table(), timing_table(),
        )  # fmt: skip
        assert [kernel.blocks for kernel in timed] == [launch.grid_x * launch.grid_y for launch in planned]
