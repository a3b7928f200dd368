"""The targets of engines. A new target is one entry of `TARGETS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from qe_edge.runtime.cuda import compute_capability
from qe_edge.runtime.cuda_provider import INSTALL, LOWEST, provider_problem
from qe_edge.runtime.engine_info import SIZED, Backend
from qe_edge.system.errors import TargetError, UnknownNameError

CUDA: Backend = "onnxruntime_cuda"


@dataclass(frozen=True)
class Target:
    """A build target.

    Attributes:
        name: As the user writes it.
        title: What it is, for lists.
        backend: What builds and runs its engines: a Python module, or "onnxruntime_cuda" for ONNX Runtime on a GPU.
        capabilities: Compute capabilities of the GPUs it serves; empty for any, or for none at all.
        built_on_device: Whether engines must be built on the GPU that runs them.
        remedy: Where the backend comes from.

    Example:
        >>> target = get_target("jetson-orin")
        >>> target.backend, target.capabilities, target.built_on_device
        ('tensorrt', ((8, 7),), True)
    """

    name: str
    title: str
    backend: Backend
    capabilities: tuple[tuple[int, int], ...] = ()
    built_on_device: bool = False
    remedy: str = ""

    @property
    def needs_plugin(self) -> bool:
        """Whether quantized layers run on the plugin's kernels and nothing else."""
        return self.backend == CUDA

    def build_problem(self) -> str | None:
        """One sentence saying why this machine cannot build for the target, None if it can; imports nothing heavy."""
        module = "onnxruntime" if self.backend == CUDA else self.backend
        if find_spec(module) is None:
            return f"Target '{self.name}' needs the Python module {module}, which is not installed."
        return self._device_problem() if self.built_on_device else None

    def run_problem(self) -> str | None:
        """One sentence saying why this machine cannot run the target's engines, None if it can."""
        if self.backend == "onnxruntime":
            return self.build_problem()
        problem = self._device_problem() or self.build_problem()
        return problem or (provider_problem() if self.backend == CUDA else None)

    def check(self) -> None:
        """Refuse a target that cannot be built here.

        Raises:
            TargetError: Saying what to install or where to run.
        """
        problem = self.build_problem()
        if problem is not None:
            raise TargetError(problem, self.remedy)

    def _device_problem(self) -> str | None:
        found = compute_capability()
        if found is None:
            return f"Target '{self.name}' needs an NVIDIA GPU, and this machine has none."
        if self.backend == CUDA and found < LOWEST:
            return f"Target '{self.name}' is for sm_80 and later, and this machine's GPU is sm_{found[0]}{found[1]}."
        if self.capabilities and found not in self.capabilities:
            wanted = " or ".join(f"sm_{major}{minor}" for major, minor in self.capabilities)
            return f"Target '{self.name}' is for {wanted}, and this machine's GPU is sm_{found[0]}{found[1]}."
        return None


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "ONNX Runtime on any CPU", "onnxruntime", remedy="Run: pip install onnxruntime."),
        Target(
            "cuda",
            "ONNX Runtime on NVIDIA GPUs from the RTX 30 series on, without TensorRT; not yet run on a GPU",
            CUDA,
            remedy=INSTALL,
        ),
        Target(
            "rtx",
            "TensorRT-RTX on desktop GPUs of the RTX 30, 40 and 50 series; built on any machine",
            "tensorrt_rtx",
            ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1)),
            remedy="Run: pip install 'qe-edge[rtx]'.",
        ),
        Target(
            "tensorrt",
            "TensorRT on NVIDIA GPUs, built on the GPU that runs it",
            "tensorrt",
            built_on_device=True,
            remedy="Run: pip install 'qe-edge[tensorrt]', on a machine with an NVIDIA GPU.",
        ),
        Target(
            "jetson-orin",
            "TensorRT on Jetson Orin (sm_87)",
            "tensorrt",
            ((8, 7),),
            built_on_device=True,
            remedy="Build on a Jetson Orin with JetPack 6.2 or 7.2, which bring TensorRT along.",
        ),
        Target(
            "jetson-thor",
            "TensorRT on Jetson Thor (sm_110)",
            "tensorrt",
            ((11, 0), (10, 1)),  # CUDA 13 counts Thor as 11.0, CUDA 12.8 counted it as 10.1
            built_on_device=True,
            remedy="Build on a Jetson Thor with JetPack 7.0 or later, which brings TensorRT along.",
        ),
    )
}


def has_limits(name: str) -> bool:
    """Whether a target's engines are built for largest sizes. Engines of ONNX Runtime take any size.

    Example:
        >>> has_limits("cpu"), has_limits("jetson-orin")
        (False, True)
    """
    return get_target(name).backend in SIZED


def get_target(name: str) -> Target:
    """Look up a target.

    Raises:
        UnknownNameError: If there is none of that name.

    Example:
        >>> get_target("cpu").title
        'ONNX Runtime on any CPU'
        >>> get_target("jetson")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.UnknownNameError: There is no target 'jetson'. Did you mean 'jetson-thor'? Known:
        cpu, cuda, jetson-orin, jetson-thor, rtx, tensorrt.
    """
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return TARGETS[name]


def check_targets(targets: Sequence[str]) -> list[str]:
    """Check targets before any work; returns the targets whose engines run on this machine.

    Raises:
        UnknownNameError: If there is no target of a name.
        TargetError: If one cannot be built here.

    Example:
        >>> check_targets(["cpu"])
        ['cpu']
    """
    for name in targets:
        get_target(name).check()
    return [name for name in targets if get_target(name).run_problem() is None]
