"""One QELinear on an emulated machine: buffers in, plan, launches, y out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from emulator.plan import Buffers, Launch, Planner, Problem, Tactic
from prepack.floats import Dtype, from_bits, to_bits
from prepack.linear import CanonicalLinear
from prepack.pack import PackedLinear, pack
from prepack.width import adapter_bits, weight_bits

DTYPE_CODE = {"f16": 0, "bf16": 1}


class Machine(Protocol):
    """What both emulators offer."""

    def add(self, array: NDArray[Any], name: str, *, writable: bool, zeroed: bool = False) -> int:
        """Register memory and return its device address; `zeroed` memory may be read before it is written."""

    def launch(self, launch: Launch, seed: int) -> list[str]:
        """Run one kernel; returns the errors that were found."""

    def clear(self) -> None:
        """Forget all memory."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: y as float32 ``[M, N]``, the errors found, and the kernels that ran."""

    y: NDArray[np.float32]
    errors: list[str]
    kernels: list[str]


def problem_of(linear: CanonicalLinear, tokens: int, dtype: Dtype) -> Problem:
    """The host code's view of a layer."""
    return Problem(
        dtype=DTYPE_CODE[dtype],
        M=tokens,
        N=linear.out_features,
        K=linear.in_features,
        act_bits=linear.act_bits,
        group_size=linear.group_size,
        has_zeros=int(linear.zeros is not None),
        has_inv_omega=int(linear.inv_omega is not None),
        rank_shared=linear.rank_shared,
        rank_routed=linear.rank_routed,
        num_experts=linear.num_experts,
        adapter_bits=adapter_bits(linear),
        weight_bits=weight_bits(linear, dtype),
    )


def aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that starts at a multiple of 256 bytes, as device allocations do."""
    room = np.empty(array.nbytes + 256, np.uint8)
    start = -room.ctypes.data % 256
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run_linear(
    machine: Machine,
    planner: Planner,
    linear: CanonicalLinear,
    x: NDArray[np.float32],
    dtype: Dtype,
    *,
    seed: int = 1,
    tactic: Tactic | None = None,
) -> Outcome:
    """Prepack, plan and run one layer. `x` is ``[M, K]`` with values that the 16-bit type holds."""
    problem = problem_of(linear, len(x), dtype)
    packed: PackedLinear = pack(linear, dtype)
    machine.clear()
    keep: list[NDArray[Any]] = []

    def add(array: NDArray[Any] | None, name: str, *, writable: bool = False) -> int:
        if array is None:
            return 0
        keep.append(aligned(array))
        return machine.add(keep[-1], name, writable=writable)

    y = aligned(np.full((len(x), linear.out_features), 0x7E00, np.uint16))
    workspace = np.full(max(1, planner.workspace_bytes(problem)), 0xFF, np.uint8)
    counters = aligned(np.zeros(planner.counter_bytes(problem), np.uint8))
    buffers = Buffers(
        counters=machine.add(counters, "counters", writable=True, zeroed=True) if counters.size else 0,
        x=add(to_bits(x, dtype), "x"),
        y=machine.add(y, "y", writable=True),
        workspace=add(workspace, "workspace", writable=True),
        **{name: add(getattr(packed, name), name) for name in WEIGHTS},
    )
    errors: list[str] = []
    launches = planner.launches(problem, buffers, tactic or Tactic())
    for launch in launches:
        errors += [f"{launch.name}: {error}" for error in machine.launch(launch, seed)]
    if counters.any():
        errors.append("counters are left that are not zero")
    return Outcome(from_bits(y, dtype), errors, [launch.name for launch in launches])


WEIGHTS = ("weight", "scales", "zeros", "columns", "inv_omega", "down", "down_scale", "up", "router")
