"""DINOv2 ViT-S/14 out of an ONNX graph, under its own names and those of transformers' InternVL vision encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional

LAYERS = 12
# name in InternVLVisionLayer -> name in the graph
LINEARS = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.projection_layer": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
NORMS = {"layernorm_before": "norm1", "layernorm_after": "norm2"}
SCALES = {"lambda_1": "layer_scale1.lambda1", "lambda_2": "layer_scale2.lambda1"}
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def read_dinov2(path: Path, grid: int) -> dict[str, Tensor]:
    """State dict of `InternVLVisionModel` for pictures of `grid` x `grid` patches.

    Args:
        path: The ONNX file; its linear weights are the constant operands of nodes named after the modules.
        grid: Patches per side; the position embeddings of the original 37 x 37 are resized (bicubic), as DINOv2 does.
    """
    tensors, weights = _read_graph(path)
    state: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        old, new = f"backbone.encoder.layer.{layer}", f"encoder.layer.{layer}"
        for name, source in LINEARS.items():
            state[f"{new}.{name}.weight"] = weights[f"{old}.{source}"]
            state[f"{new}.{name}.bias"] = tensors[f"{old}.{source}.bias"]
        for name, source in NORMS.items():
            for part in ("weight", "bias"):
                state[f"{new}.{name}.{part}"] = tensors[f"{old}.{source}.{part}"]
        for name, source in SCALES.items():
            state[f"{new}.{name}"] = tensors[f"{old}.{source}"]
    for part in ("weight", "bias"):
        state[f"layernorm.{part}"] = tensors[f"backbone.layernorm.{part}"]
        patches = f"patch_embeddings.projection.{part}"
        state[f"embeddings.{patches}"] = tensors[f"backbone.embeddings.{patches}"]
    state["embeddings.cls_token"] = tensors["backbone.embeddings.cls_token"]
    resized = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    first, others = (torch.from_numpy(tensors[name].copy()) for name in (CLASS_POSITION, PATCH_POSITIONS))
    resized["embeddings.position_embeddings"] = torch.cat((first, _resize_positions(others, grid)), dim=1)
    return resized


def read_dinov2_checkpoint(path: Path) -> dict[str, Tensor]:
    """State dict of `Dinov2Model` under the names of released checkpoints, for the original's 37 x 37 patches.

    Args:
        path: The ONNX file.
    """
    tensors, weights = _read_graph(path)
    state = {f"{name}.weight": array for name, array in weights.items()} | tensors
    kept = {
        name.removeprefix("backbone."): torch.from_numpy(array.copy())
        for name, array in state.items()
        if name.startswith("backbone.")
    }
    positions = [torch.from_numpy(tensors[name].copy()) for name in (CLASS_POSITION, PATCH_POSITIONS)]
    kept["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    kept["embeddings.mask_token"] = torch.zeros(1, positions[0].shape[-1])  # of training only, not in the graph
    return kept


def _read_graph(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Constants by name, and linear weights `[out, in]` by module: "backbone.encoder.layer.0.mlp.fc1"."""
    graph = onnx.load(str(path)).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    # nodes are called "/backbone/encoder/layer.0/mlp/fc1/MatMul"
    weights = {
        node.name.strip("/").replace("/", ".").removesuffix(".MatMul"): tensors[operand].T
        for node in graph.node
        if node.op_type == "MatMul"
        for operand in node.input
        if operand in tensors
    }
    return tensors, weights


def _resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings `[1, n * n, width]` as `[1, grid * grid, width]`."""
    side, width = round(positions.shape[1] ** 0.5), positions.shape[2]
    square = positions.view(1, side, side, width).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).reshape(1, grid * grid, width)
