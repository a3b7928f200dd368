"""Decode plans with more slices of K than the plan would choose: it does so only where K is huge or memory is short."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from emulator.plan import Buffers, Launch, Planner, Problem, Tactic

_POINTERS = (
    "act", "token_scale", "sums", "weight", "scales", "zeros", "columns", "partial", "h", "up", "expert", "order", "y",
    "x", "inv_omega", "scores", "slices", "counters", "code_shifts",
)  # fmt: skip
_COUNTS = (
    "M", "N", "Np", "Kp", "E", "shared_tiles", "routed_tiles", "splits", "up_bits", "K", "act_max", "k_splits",
    "chunks", "slice_chunks", "warp_chunks", "sets", "set_warps", "set_factor", "token_groups", "group_sums_at",
    "ring_at", "results_at", "tokens_at", "scores_at", "h_at",
)  # fmt: skip


class MainArgs(ctypes.Structure):
    """MainArgs of include/qe_edge/args.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _POINTERS),
        *((name, ctypes.c_int32) for name in _COUNTS),
    ]


def main_args(launch: Launch) -> MainArgs:
    """The arguments of a launch of `main`; changes of them change the launch."""
    if launch.args_bytes != ctypes.sizeof(MainArgs):
        raise ValueError("MainArgs in tests/forced.py is not the one of args.h. Copy its fields.")
    return MainArgs.from_buffer(launch.args)


_CLUSTER_POINTERS = (
    "x", "inv_omega", "router", "down", "down_scale", "weight", "scales", "zeros", "columns", "up", "y", "code_shifts",
)  # fmt: skip
CLUSTER_PLACES = (
    "group_sums_at", "ring_at", "largest_at", "slice_sum_at", "part_at", "score_part_at", "routed_part_at",
    "results_at", "unit_at", "scores_at", "expert_at", "x_at", "router_at", "down_at", "low_at", "h_at", "boxes_at",
)  # fmt: skip
_CLUSTER_COUNTS = (
    "M", "N", "Np", "K", "E", "shared_tiles", "routed_tiles", "factor_bits", "act_max", "main_warps", "own_maxima",
    "pieces", "copies_down", "score_warps", "tile_parts", "routed_parts", "cluster_blocks", "cluster_shift",
    "cluster_sets", "longer_clusters", "chunks", "slice_chunks", "parts", "part_chunks", "parts_factor",
    "token_factor", *CLUSTER_PLACES, "row_bytes",
)  # fmt: skip


class ClusterArgs(ctypes.Structure):
    """ClusterArgs of include/qe_edge/args.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in _CLUSTER_POINTERS),
        *((name, ctypes.c_int32) for name in _CLUSTER_COUNTS),
    ]


def cluster_args(launch: Launch) -> ClusterArgs:
    """The arguments of a launch of clusters."""
    if launch.args_bytes != ctypes.sizeof(ClusterArgs):
        raise ValueError("ClusterArgs in tests/forced.py is not the one of args.h. Copy its fields.")
    return ClusterArgs.from_buffer(launch.args)


@dataclass(frozen=True)
class SlicedPlanner(Planner):
    """A planner whose decode plans have so many slices of K, or one chunk of 128 rows for each where K has fewer."""

    slices: int = 1

    def workspace_bytes(self, problem: Problem) -> int:
        """With room for what every slice adds to y behind the plan's own."""
        columns = (int(problem.N) + 31) // 32 * 32
        return super().workspace_bytes(problem) + self.slices * int(problem.M) * columns * 4

    def launches(self, problem: Problem, buffers: Buffers, tactic: Tactic) -> list[Launch]:
        """The launches in order, the last with slices."""
        launches = super().launches(problem, buffers, tactic)
        main = launches[-1]
        args = main_args(main)
        if args.k_splits != 1 or args.sets != 1:
            raise ValueError("The plan has slices already, or several sets of columns. Choose a smaller layer.")
        args.slice_chunks = -(-args.chunks // self.slices)
        args.k_splits = -(-args.chunks // args.slice_chunks)
        args.warp_chunks = -(-args.slice_chunks // args.set_warps)
        args.slices = buffers.workspace + super().workspace_bytes(problem)
        main.grid_y = args.k_splits * args.token_groups
        return launches


def forced_slices(planner: Planner, slices: int) -> Planner:
    """The same planner with slices of K."""
    return SlicedPlanner(planner.library, slices)
