"""Random quantized layers, and graphs that run in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from qe_edge.layers.linear import Adapters, QELinear, QuantizedLinear
from qe_edge.numerics.grids import WeightGrid, pack_int4, quantize_int8, quantize_weight


@dataclass(frozen=True)
class Variant:
    """What a layer has."""

    in_features: int = 64
    out_features: int = 48
    bits: int = 4
    act_bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    factors: Literal["none", "float", "int8", "int4"] = "int8"
    rank_shared: int = 8
    rank_routed: int = 8
    experts: int = 4
    bias: bool = True
    inv_omega: bool = True


def make_layer(variant: Variant, seed: int = 0) -> QELinear:
    """A random layer; its corrections are as large as its weights, so that a wrong one shows."""
    torch.manual_seed(seed)
    width, height = variant.in_features, variant.out_features
    weight = quantize_weight(
        torch.randn(height, width), WeightGrid(variant.bits, variant.group_size, symmetric=variant.symmetric)
    )
    omega = None
    if variant.inv_omega:
        omega = (torch.rand(width) + 0.5).half()
        omega[::7] = 0
    experts = variant.experts if variant.experts > 1 else 0
    rank = variant.rank_shared + experts * variant.rank_routed
    adapters = None if variant.factors == "none" or not rank else _adapters(variant, experts, rank)
    bias = torch.randn(height) if variant.bias else None
    return QELinear(QuantizedLinear(weight, variant.act_bits, omega, adapters), bias)


def _adapters(variant: Variant, experts: int, rank: int) -> Adapters:
    down, up = torch.randn(rank, variant.in_features), torch.randn(variant.out_features, rank)
    router = torch.rand(experts, variant.in_features).half() if experts else None
    scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    if variant.factors == "int8":
        down, down_scale = quantize_int8(down, 0)
        up, up_scale = quantize_int8(up, 0)
        scales = (down_scale, up_scale)
    if variant.factors == "int4":
        scales = (torch.rand(rank).half(), torch.rand(variant.out_features).half())
        down, up = (pack_int4(torch.randint(-8, 8, factor.shape, dtype=torch.int8)) for factor in (down, up))
    return Adapters(
        down=down,
        up=up,
        down_scale=scales[0],
        up_scale=scales[1],
        rank_shared=variant.rank_shared,
        rank_routed=variant.rank_routed if experts else 0,
        num_experts=experts,
        router=router,
    )


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a graph in ONNX Runtime, exactly."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    proto = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
