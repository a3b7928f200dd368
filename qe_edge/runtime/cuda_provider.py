"""Whether ONNX Runtime can compute on this machine's GPU. Not yet run on hardware."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from qe_edge.runtime.cuda import Driver
from qe_edge.system.errors import TargetError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import onnxruntime as ort
else:
    ort = lazy_module("onnxruntime")

PROVIDER = "CUDAExecutionProvider"
INSTALL = "Run: pip uninstall -y onnxruntime onnxruntime-gpu; pip install 'onnxruntime-gpu[cuda,cudnn]'."
LOWEST = (8, 0)  # compute capability that the kernels are written for


def provider_problem() -> str | None:
    """One sentence saying why the ONNX Runtime that is installed cannot use a GPU, None if it can.

    Example:
        >>> (provider_problem() is None) == (PROVIDER in ort.get_available_providers())
        True
    """
    if PROVIDER in ort.get_available_providers():
        return None
    if _is_installed("onnxruntime") and _is_installed("onnxruntime-gpu"):
        return "onnxruntime was installed over onnxruntime-gpu: both write into one folder, and the last one stays."
    return "The ONNX Runtime that is installed has no CUDA provider."


def check_provider() -> None:
    """Refuse to go on without a GPU that the kernels know, or without ONNX Runtime's provider for it.

    Raises:
        TargetError: Saying what is missing and where it comes from.

    Example:
        >>> check_provider()  # doctest: +SKIP
    """
    capability = Driver().compute_capability()
    if capability < LOWEST:
        raise TargetError(
            f"This GPU has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0 or later.",
            "Use a GPU of the RTX 30 series or later, or the 'cpu' target.",
        )
    problem = provider_problem()
    if problem is not None:
        raise TargetError(problem, INSTALL)


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
