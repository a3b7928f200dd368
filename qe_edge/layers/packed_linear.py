"""`QELinear` on a GPU: the plugin's kernels as an operator of torch, `qe_edge::packed_linear`.

The operator has a fake implementation, so that torch.compile and CUDA graphs take it as one node. On a CPU it computes
the reference from the same packed tensors, slowly. Whole models have run on one GPU, an H100 (docs/results.md).
"""

from __future__ import annotations

import threading
from ctypes import Structure
from dataclasses import astuple
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.layers.kernel_library import KernelLibrary, kernel_library, problem_of
from qe_edge.layers.linear import QELinear, quantized_linears
from qe_edge.prepack.linear import CanonicalLinear, PackError
from qe_edge.prepack.neutral import without_neutral
from qe_edge.prepack.pack import PackedLinear, pack
from qe_edge.prepack.reference import qe_linear
from qe_edge.prepack.unpack import Form, unpack
from qe_edge.system.errors import TargetError

Dtype = Literal["f16", "bf16"]
DTYPES: dict[torch.dtype, Dtype] = {torch.float16: "f16", torch.bfloat16: "bf16"}
ROLES = ("weight", "columns", "scales", "zeros", "inv_omega", "down", "down_scale", "up", "router")
SCHEMA = (
    "(Tensor x, Tensor weight, Tensor columns, Tensor? scales, Tensor? zeros, Tensor? inv_omega, Tensor? down, "
    "Tensor? down_scale, Tensor? up, Tensor? router, Tensor counters, int[] form, str library) -> Tensor"
)
BLOCK, TOKEN_GROUPS = 32, 4  # output channels of a counter, and groups of tokens that decode together at most
ALIGNMENT = 16  # bytes, of x
# dtypes in which patterns and numbers are kept: model.half() and model.bfloat16() would change floats
KEPT = {np.dtype(np.uint16): np.int16, np.dtype(np.float32): np.int32}


def packed_linear(x: Tensor, weight: Tensor, columns: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401 - see SCHEMA
    """The reference, in float64 on the CPU: `[..., in]` float16 or bfloat16 to `[..., out]`.

    Example:
        >>> from qe_edge.layers.linear import QuantizedLinear
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> layer = QELinear(QuantizedLinear(quantize_weight(torch.ones(64, 128), WeightGrid(4)), activation_bits=8))
        >>> packed = PackedQELinear(layer, torch.float16, "libqe_plugin.so")
        >>> packed(torch.ones(2, 128))[:, 0]  # runs this operator, on a CPU without the library
        tensor([128., 128.])
    """
    tensors, form = dict(zip(ROLES, (weight, columns, *rest[:-3]), strict=True)), Form(*rest[-2])
    kept = {KEPT[dtype]: dtype for dtype in KEPT}
    arrays: dict[str, Any] = {
        role: None if tensor is None else (array := tensor.numpy()).view(kept.get(array.dtype.type, array.dtype))
        for role, tensor in tensors.items()
    }
    packed = PackedLinear(DTYPES[x.dtype], form.weight_bits, form.adapter_bits, **arrays)
    tokens = x.reshape(-1, form.in_features).float().numpy()
    y = qe_linear(unpack(packed, form), tokens, DTYPES[x.dtype])
    return torch.from_numpy(y).to(x.dtype).reshape(*x.shape[:-1], form.out_features)


def _on_gpu(x: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401 - see SCHEMA
    """The same with the library's kernels, on the current stream of the device of `x`."""
    form = tuple(rest[-2])
    in_features, out_features = form[:2]
    x = x.contiguous()
    x = x.clone() if x.data_ptr() % ALIGNMENT else x
    y = x.new_empty((*x.shape[:-1], out_features))
    if not y.numel():
        return y
    call = _call(rest[-1], form, x.dtype, x.numel() // in_features)
    device = x.get_device()
    if device == torch.cuda.current_device():
        _queue(call, device, x, rest, y)
    else:
        with torch.cuda.device(device):
            _queue(call, device, x, rest, y)
    return y


class _Call(NamedTuple):
    """What all calls with one form and one number of tokens share."""

    library: KernelLibrary
    problem: Structure
    workspace_bytes: int
    counter_bytes: int


@lru_cache(maxsize=4096)
def _call(path: str, form: tuple[int, ...], dtype: torch.dtype, tokens: int) -> _Call:
    library, problem = kernel_library(path), problem_of(Form(*form), DTYPES[dtype], tokens)
    return _Call(library, problem, *library.memory(problem))


def _queue(call: _Call, device: int, x: Tensor, rest: tuple[Any, ...], y: Tensor) -> None:
    """Launch the kernels on the current stream of the current device, whose index is given."""
    weight, columns, scales, zeros, inv_omega, down, down_scale, up, router, counters, _, _ = rest
    if getattr(THREAD, "device", None) != device:  # a thread that has called nothing of CUDA has no context yet
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch has no types here
        event.record()  # makes one current, also while a graph is captured
        THREAD.device = device
    # The caching allocator knows streams and graphs. A workspace that we kept ourselves would have to know them too.
    workspace = torch.empty(max(call.workspace_bytes, 1), dtype=torch.uint8, device=x.device)
    if counters.nbytes < call.counter_bytes:
        counters = None  # decode is slower then
    tensors = (x, weight, scales, zeros, columns, inv_omega, down, down_scale, up, router, y, workspace, counters)
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    # the handle alone, as Triton asks for it: an object for every call would take longer than its launch
    call.library.run(call.problem, addresses, torch._C._cuda_getCurrentRawStream(device))


def _shape(x: Tensor, *rest: Any) -> Tensor:  # noqa: ANN401 - see SCHEMA
    return x.new_empty((*x.shape[:-1], Form(*rest[-2]).out_features))


THREAD = threading.local()
# Not torch.library.custom_op, whose wrappers take 3 to 7 us of every call.
LIBRARY: Any = torch.library.Library("qe_edge", "DEF")  # type: ignore[no-untyped-call] # torch has no types here
LIBRARY.define("packed_linear" + SCHEMA, tags=torch.Tag.pt2_compliant_tag)
LIBRARY.impl("packed_linear", packed_linear, "CPU")
LIBRARY.impl("packed_linear", _on_gpu, "CUDA")
torch.library.register_fake("qe_edge::packed_linear", _shape, lib=LIBRARY)
OPERATOR = torch.ops.qe_edge.packed_linear.default


class PackedQELinear(nn.Module):
    """A `QELinear` in the layout of the kernels. Inference only.

    Inputs of any float dtype and shape `[..., in]`; computed in the dtype that it was packed for, and returned in the
    input's.

    Args:
        layer: The layer, on the CPU.
        dtype: float16 or bfloat16, the model's.
        library: Path of `libqe_plugin.so`; not opened before a tensor on a GPU comes.

    Raises:
        TargetError: If no kernel runs such a layer.

    Example:
        >>> from qe_edge.layers.linear import QuantizedLinear
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> layer = QELinear(QuantizedLinear(quantize_weight(torch.ones(64, 128), WeightGrid(4)), activation_bits=8))
        >>> packed = PackedQELinear(layer, torch.float16, "libqe_plugin.so")
        >>> packed
        PackedQELinear(in_features=128, out_features=64, weight_bits=4, group_size=-1, activation_bits=8, packed
        for torch.float16)
    """

    def __init__(self, layer: QELinear, dtype: torch.dtype, library: str) -> None:
        super().__init__()
        linear = canonical(layer)
        try:
            packed = pack(linear, DTYPES[dtype])
        except PackError as error:
            raise TargetError(f"No kernel runs a layer: {error}", "Load the model without a device.") from error
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, dtype
        self.library = library
        self.form = list(astuple(Form.of(linear, packed)))
        for role in ROLES:
            array = getattr(packed, role)
            kept = None if array is None else np.ascontiguousarray(array)
            tensor = None if kept is None else torch.from_numpy(kept.view(KEPT.get(kept.dtype, kept.dtype)).copy())
            self.register_buffer(role, tensor)
        blocks = -(-layer.out_features // BLOCK)
        self.register_buffer("counters", torch.zeros(TOKEN_GROUPS * blocks, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `x` `[..., in]`; returns `[..., out]` in the dtype of `x`."""
        buffers = self._buffers  # attributes would be looked up among parameters first, ten times a call
        tensors = [buffers[role] for role in (*ROLES, "counters")]
        same = x.dtype == self.dtype
        y: Tensor = OPERATOR(x if same else x.to(self.dtype), *tensors, self.form, self.library)
        return y if same else y.to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and precision."""
        form = Form(*self.form)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weight_bits={form.weight_bits}, "
            f"group_size={form.group_size}, activation_bits={form.act_bits}, packed for {self.dtype}"
        )


def canonical(layer: QELinear) -> CanonicalLinear:
    """The tensors of a layer as the kernels' packing reads them, transposed.

    Raises:
        TargetError: If the layer has parts that only PyTorch computes.

    Example:
        >>> from qe_edge.layers.linear import QuantizedLinear
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> layer = QELinear(QuantizedLinear(quantize_weight(torch.ones(64, 128), WeightGrid(4)), activation_bits=8))
        >>> canonical(layer).qweight.shape
        (128, 64)
    """
    if layer.parts is not None:
        raise TargetError("A layer has parts that no kernel computes.", "Load the model without a device.")

    def real(tensor: Tensor | None) -> Any:  # noqa: ANN401 - an array or None
        return None if tensor is None else np.ascontiguousarray(tensor.float().numpy().T)

    down, up = (
        real(codes) if codes is None or codes.is_floating_point() else np.ascontiguousarray(codes.numpy().T)
        for codes in (layer.down_codes(), layer.up_codes())
    )
    fields = {
        "qweight": np.ascontiguousarray(layer.codes().numpy().T),
        "scales": real(layer.scales),
        "zeros": None if layer.zeros is None else np.ascontiguousarray(layer.zeros.numpy().T),
        "inv_omega": real(layer.inv_omega),
        "down": down,
        "up": up,
        "down_scale": real(layer.down_scale),
        "up_scale": real(layer.up_scale),
        "router": real(layer.router),
        "bias": real(layer.bias),
    }
    numbers = {
        "group_size": layer.group_size,
        "act_bits": layer.activation_bits,
        "rank_shared": layer.rank_shared,
        "rank_routed": layer.rank_routed,
        "num_experts": layer.num_experts,
    }
    present = {name: array for name, array in fields.items() if array is not None}
    return CanonicalLinear(**without_neutral({**present, **numbers}))


def pack_layers(model: nn.Module, dtype: torch.dtype, library: str) -> int:
    """Replace every `QELinear` of a model by its packed form, in place; returns how many there are.

    Args:
        model: On the CPU.
        dtype: float16 or bfloat16.
        library: Path of `libqe_plugin.so`.

    Raises:
        TargetError: If no kernel runs one of them; nothing is replaced then.

    Example:
        >>> from qe_edge.layers.linear import QuantizedLinear
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> layer = QELinear(QuantizedLinear(quantize_weight(torch.ones(64, 128), WeightGrid(4)), activation_bits=8))
        >>> model = nn.Sequential(layer, nn.ReLU())
        >>> pack_layers(model, torch.float16, "libqe_plugin.so"), type(model[0]).__name__
        (1, 'PackedQELinear')
    """
    packed = {name: PackedQELinear(layer, dtype, library) for name, layer in quantized_linears(model).items()}
    for name, layer in packed.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return len(packed)
