"""A quantized checkpoint as a model of PyTorch, on a CPU or on a GPU with the plugin's kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from qe_edge.layers.kernel_library import kernel_library
from qe_edge.layers.packed_linear import DTYPES, pack_layers
from qe_edge.models import quantized
from qe_edge.models.loading import LoadedModel
from qe_edge.runtime.plugin_library import find_plugin_library
from qe_edge.system.errors import InputError, TargetError

CPU = "cpu"


def load_quantized(folder: str | Path, device: str = CPU, *, plugin_library: Path | None = None) -> LoadedModel:
    """Load a quantized checkpoint; reloading on a CPU is bit-identical.

    On a GPU the layers run the kernels of `libqe_plugin.so`, in float16 or bfloat16 as the model is stored (float16 for
    a model in float32). The model works with `generate`, torch.compile and CUDA graphs; run it once before a capture,
    and on one stream at a time. Run on one GPU, an H100 (docs/results.md).

    Args:
        folder: Output of `qe-edge quantize`.
        device: "cpu", "cuda" or "cuda:1".
        plugin_library: The library, None for the one that is found.

    Raises:
        ArtifactError: If the folder is no checkpoint of ours, is damaged, or is of a newer version.
        InputError: If there is no such device.
        TargetError: If this machine has no GPU or no library, or no kernel runs a layer.

    Example:
        `load_quantized("out/checkpoint", device="cuda").model.generate(**inputs)`
    """
    chosen = _device(device)
    if chosen.type == CPU:
        return quantized.load_quantized(folder)
    library = str(find_plugin_library(plugin_library))
    with torch.cuda.device(chosen):
        torch.cuda.current_stream().synchronize()  # makes the context that the kernels are checked in
        kernel_library(library).check()
    loaded = quantized.load_quantized(folder)
    dtype = loaded.model.dtype if loaded.model.dtype in DTYPES else torch.float16
    pack_layers(loaded.model, dtype, library)
    torch.nn.Module.to(loaded.model, device=chosen, dtype=dtype)
    return loaded


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"There is no device '{name}'.", "Choose 'cpu' or 'cuda'.") from error
    if device.type not in (CPU, "cuda"):
        raise InputError(f"Quantized layers have no kernels for '{name}'.", "Choose 'cpu' or 'cuda'.")
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        raise TargetError(
            f"PyTorch sees no GPU '{name}' on this machine.", "Leave device out, or install PyTorch for CUDA."
        )
    return device
