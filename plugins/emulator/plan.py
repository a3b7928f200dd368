"""The shipped launch plan (include/qe_edge/plan.h) through ctypes, so that tests launch what the plugin launches."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path


class Problem(ctypes.Structure):
    """QeProblem: one quantized linear and its token count."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "dtype", "M", "N", "K", "act_bits", "group_size", "has_zeros", "has_inv_omega",
            "rank_shared", "rank_routed", "num_experts", "adapter_bits", "weight_bits",
        )
    ]  # fmt: skip


class Tactic(ctypes.Structure):
    """QeTactic: zero means that the plan chooses."""

    _fields_ = [(name, ctypes.c_int32) for name in ("block_rows", "decode_warps", "multiprocessors", "clusters")]


class Buffers(ctypes.Structure):
    """QeBuffers: addresses."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "x", "weight", "scales", "zeros", "columns", "inv_omega", "down", "down_scale", "up", "router", "y",
            "workspace", "counters",
        )
    ]  # fmt: skip


class Launch(ctypes.Structure):
    """QeLaunch: one kernel with its grid and argument block."""

    _fields_ = [
        ("kernel", ctypes.c_char * 48),
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("args_bytes", ctypes.c_uint32),
        ("overlaps", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),  # the arguments stand at a multiple of 8
        ("args", ctypes.c_ubyte * 320),
    ]

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return bytes(self.kernel).decode()


class Plan(ctypes.Structure):
    """QePlan: at most three launches."""

    _fields_ = [("count", ctypes.c_int32), ("padding", ctypes.c_int32), ("launch", Launch * 3)]


class PlanError(ValueError):
    """The host code refuses the problem; the message is its own."""


@dataclass(frozen=True)
class Planner:
    """The plan functions of one built library."""

    library: ctypes.CDLL

    @classmethod
    def load(cls, path: Path) -> Planner:
        """The planner of a library that `emulator.build` made."""
        library = ctypes.CDLL(str(path))
        library.QeRefuse.restype = ctypes.c_char_p
        library.QeMakePlan.restype = ctypes.c_char_p
        library.QeWorkspaceBytes.restype = ctypes.c_size_t
        library.QeCounterBytes.restype = ctypes.c_size_t
        return cls(library)

    def refusal(self, problem: Problem) -> str | None:
        """Why the kernels cannot run the problem, or None."""
        why = self.library.QeRefuse(ctypes.byref(problem))
        return None if why is None else why.decode()

    def workspace_bytes(self, problem: Problem) -> int:
        """Device memory that the launches of the problem need besides their tensors."""
        return int(self.library.QeWorkspaceBytes(ctypes.byref(problem)))

    def counter_bytes(self, problem: Problem) -> int:
        """Device memory that is zero before the first launch and after every plan."""
        return int(self.library.QeCounterBytes(ctypes.byref(problem)))

    def launches(self, problem: Problem, buffers: Buffers, tactic: Tactic) -> list[Launch]:
        """The launches in order. Raises PlanError when the host code refuses."""
        plan = Plan()
        why = self.library.QeMakePlan(
            ctypes.byref(problem), ctypes.byref(buffers), ctypes.byref(tactic), ctypes.byref(plan)
        )
        if why is not None:
            raise PlanError(why.decode())
        return [plan.launch[i] for i in range(plan.count)]
