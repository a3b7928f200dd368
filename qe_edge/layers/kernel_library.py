"""The functions of `libqe_plugin.so` that run one layer on a GPU (plugins/include/qe_edge/layer.h), without TensorRT.

Run on one GPU, an H100; tests call them with a stand-in for CUDA's driver.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache

from qe_edge.prepack.unpack import Form
from qe_edge.system.errors import TargetError

REMEDY = "Build it for this machine with 'qe-edge build-plugin'."
DTYPES = {"f16": 0, "bf16": 1}
COUNTED = ("dtype", "M", "N", "K", "act_bits", "group_size", "has_zeros", "has_inv_omega", "rank_shared",
           "rank_routed", "num_experts", "adapter_bits", "weight_bits")  # fmt: skip
ADDRESSES = ("x", "weight", "scales", "zeros", "columns", "inv_omega", "down", "down_scale", "up", "router", "y",
             "workspace", "counters")  # fmt: skip


class _Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in COUNTED]


class _Buffers(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ADDRESSES]


def problem_of(form: Form, dtype: str, tokens: int) -> ctypes.Structure:
    """A layer and its number of tokens, as the library reads them.

    Example:
        >>> from qe_edge.layers.linear import QELinear, QuantizedLinear
        >>> from qe_edge.layers.packed_linear import PackedQELinear
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> import torch
        >>> layer = QELinear(QuantizedLinear(quantize_weight(torch.ones(64, 128), WeightGrid(4)), activation_bits=8))
        >>> form = Form(*PackedQELinear(layer, torch.float16, "libqe_plugin.so").form)
        >>> problem = problem_of(form, "f16", tokens=7)
        >>> problem.M, problem.N, problem.K, problem.weight_bits
        (7, 64, 128, 4)
    """
    values = asdict(form)
    sizes = {"N": values.pop("out_features"), "K": values.pop("in_features")}
    return _Problem(dtype=DTYPES[dtype], M=tokens, **sizes, **values)


class KernelLibrary:
    """One library.

    Args:
        path: Its file.

    Raises:
        TargetError: If it cannot be loaded, or is of an earlier version.

    Example:
        >>> library = KernelLibrary("qe_edge/lib/libqe_plugin.so")  # doctest: +SKIP
        >>> library.check()  # doctest: +SKIP
    """

    def __init__(self, path: str) -> None:
        try:
            library = ctypes.CDLL(path)
            self._check, self._memory, self._run = library.QeCheckKernels, library.QeLayerMemory, library.QeRunLayer
            self._layout = getattr(library, "QeLayoutVersion", None)
        except OSError as error:
            raise TargetError(f"The plugin library '{path}' cannot be loaded: {error}.", REMEDY) from error
        except AttributeError as error:
            raise TargetError(f"The plugin library '{path}' is too old to run single layers.", REMEDY) from error
        for function in (self._check, self._memory, self._run):
            function.restype = ctypes.c_char_p
        self._run.argtypes = (ctypes.c_void_p,) * 3

    def layout_version(self) -> int:
        """Version of the packed weights that the kernels read.

        Raises:
            TargetError: If the library is of an earlier version, which cannot say.
        """
        if self._layout is None:
            raise TargetError("The plugin library is too old to serve ONNX Runtime.", REMEDY)
        return int(self._layout())

    def check(self) -> None:
        """Compare the kernels with known answers in the current CUDA context; the first call takes a moment.

        Raises:
            TargetError: If they cannot run here, or compute something else.
        """
        _refuse(self._check())

    def memory(self, problem: ctypes.Structure) -> tuple[int, int]:
        """Bytes of the workspace and of the counters of a problem.

        Raises:
            TargetError: If the kernels cannot run it.
        """
        workspace, counters = ctypes.c_size_t(), ctypes.c_size_t()
        _refuse(self._memory(ctypes.byref(problem), ctypes.byref(workspace), ctypes.byref(counters)))
        return workspace.value, counters.value

    def run(self, problem: ctypes.Structure, addresses: Sequence[int], stream: int) -> None:
        """Queue a layer on a stream of the current CUDA context.

        Args:
            problem: From `problem_of`.
            addresses: In the order of `ADDRESSES`; 0 for what the layer does not have.
            stream: The stream's handle.

        Raises:
            TargetError: If it cannot be launched.
        """
        _refuse(self._run(ctypes.byref(problem), ctypes.byref(_Buffers(*addresses)), stream))


@lru_cache(maxsize=8)
def kernel_library(path: str) -> KernelLibrary:
    """The library of a path, loaded once.

    Raises:
        TargetError: As `KernelLibrary`.

    Example:
        >>> kernel_library("no-such-library.so")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.TargetError: The plugin library 'no-such-library.so' cannot be loaded:
        no-such-library.so: cannot open shared object file: No such file or directory. Build it for this machine
        with 'qe-edge build-plugin'.
    """
    return KernelLibrary(path)


def _refuse(why: bytes | None) -> None:
    """Raise what the library says: one sentence about what is wrong and one about what to do."""
    if why is None:
        return
    problem, _, remedy = why.decode(errors="replace").partition(". ")
    raise TargetError(f"{problem.rstrip('.')}.", remedy or REMEDY)
