"""`qe-edge predict` times the launches that the plugin plans: as many, with the same grids."""

from __future__ import annotations

from itertools import product

import pytest
from qe_edge.predict.clusters import cut_clusters
from qe_edge.predict.decode import cut_decode
from qe_edge.predict.kernels import plugin_kernels
from qe_edge.predict.problem import Correction, Problem
from qe_edge.predict.shapes import Linear
from qe_edge.predict.tables import get_device, instruction_table, timing_table

from emulator.plan import Buffers, Planner, Tactic
from tests.forced import cluster_args
from tests.test_plan import problem

CORRECTIONS = [(0, 0, 0, 16), (64, 0, 0, 4), (64, 32, 8, 16), (32, 32, 1, 8), (0, 16, 4, 8), (24, 8, 2, 16)]


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 16, 17, 64, 100, 1024])
def test_grids(planner: Planner, tokens: int, correction: tuple[int, int, int, int]) -> None:
    shared, routed, experts, bits = correction
    for k, n in ((1536, 2048), (8960, 1536), (264, 72), (18944, 3584)):
        planned = planner.launches(
            problem(M=tokens, K=k, N=n, rank_shared=shared, rank_routed=routed, num_experts=experts, adapter_bits=bits),
            Buffers(counters=1),
            Tactic(),
        )
        asked, orin = (
            Problem(Linear(k, (n,)), tokens, "s8_c", Correction(*correction), k * n / 2),
            get_device("orin-agx"),
        )
        timed = plugin_kernels(asked, orin, instruction_table(), timing_table())
        assert [kernel.blocks for kernel in timed] == [launch.grid_x * launch.grid_y for launch in planned]
        if asked.decode(orin.multiprocessors):
            cut = cut_decode(asked, orin.multiprocessors)
            assert 32 * cut.sets * cut.warps == planned[-1].threads


FORMS = {"s8_c": (8, -1, 0, 4), "s8_g64z": (8, 64, 1, 4), "s8w3_c": (8, -1, 0, 3), "h_g128z": (0, 128, 1, 4)}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ["h100", "thor", "rtx-5090"])
def test_clusters(planner: Planner, name: str, correction: tuple[int, int, int, int]) -> None:
    """On chips from 9.0 on 1 to 4 tokens are one launch, cut as the plan cuts it."""
    (shared, routed, experts, bits), device = correction, get_device(name)
    some = 0
    for (variant, form), tokens in product(FORMS.items(), (1, 2, 4, 5)):
        act, group, zeros, weight = form
        for k, n in ((1536, 2048), (8960, 1536), (384, 72), (18944, 3584), (3584, 37888)):
            case = problem(
                M=tokens, K=k, N=n, rank_shared=shared, rank_routed=routed, num_experts=experts, adapter_bits=bits,
                act_bits=act, group_size=group, has_zeros=zeros, weight_bits=weight,
            )  # fmt: skip
            tactic = Tactic(multiprocessors=device.multiprocessors, clusters=1)
            first = planner.launches(case, Buffers(counters=1), tactic)[0]
            asked = Problem(Linear(k, (n,)), tokens, variant, Correction(*correction), k * n / 2)
            cut = cut_clusters(asked, device.multiprocessors)
            assert (cut is not None) == first.name.startswith("qe_cluster")
            if cut is not None:
                some += 1
                (timed,) = plugin_kernels(asked, device, instruction_table(), timing_table())
                assert timed.blocks == first.grid_x * first.grid_y
                args = cluster_args(first)
                assert (cut.blocks, cut.parts, int(cut.copies)) == (args.cluster_blocks, args.parts, args.copies_down)
    assert some > 30
