"""compressed-tensors' "pack-quantized": codes in words of 32 bits, with scales and zero points beside them."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import torch

from qe_edge.formats.base import Conversion
from qe_edge.formats.carried import CarriedLayer, Piece, piece
from qe_edge.formats.grids import on_one_grid
from qe_edge.formats.transformers_folder import TransformersFolder
from qe_edge.formats.words import packed_words, words_in
from qe_edge.numerics.grids import PER_CHANNEL


class CompressedTensors(TransformersFolder):
    """The format for vLLM, TensorRT Edge-LLM and transformers.

    Example:
        >>> CompressedTensors().reader
        'vLLM, TensorRT Edge-LLM and transformers with the package compressed-tensors'
    """

    reader: ClassVar[str] = "vLLM, TensorRT Edge-LLM and transformers with the package compressed-tensors"

    def layer_pieces(self, layer: CarriedLayer) -> dict[str, Piece]:
        """Codes along the input channels, zero points along the output channels."""
        geometry, name, groups = layer.geometry, layer.name, layer.groups
        out_features, in_features, bits = geometry.out_features, geometry.in_features, layer.grid.bits
        words = words_in(in_features, bits)
        # where there are zero points, transformers decodes in the type of the scales, which must hold (q - z) * scale
        dtype = layer.scale_dtype if layer.grid.symmetric else torch.float32
        found = {
            f"{name}.weight_packed": piece(
                (out_features, words), torch.int32, lambda: packed_words(layer.codes(), bits)
            ),
            f"{name}.weight_scale": piece((out_features, groups), dtype, lambda: layer.scales().to(dtype)),
            f"{name}.weight_shape": piece((2,), torch.int64, lambda: torch.tensor([out_features, in_features])),
        }
        if not layer.grid.symmetric:
            found[f"{name}.weight_zero_point"] = piece(
                (words_in(out_features, bits), groups), torch.int32, lambda: packed_words(layer.zeros().T, bits).T
            )
        return found

    def quantization_config(self, conversion: Conversion) -> dict[str, Any]:
        """One group of layers for each kind of grid."""
        kinds: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, layer in conversion.coded.items():
            weights = _weights(layer)
            kinds.setdefault(json.dumps(weights), (weights, []))[1].append(name)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{number}": {
                    # one kind covers all linear layers but the ignored: runtimes that fuse layers read that best
                    "targets": ["Linear"] if len(kinds) == 1 else names,
                    "weights": weights,
                    "input_activations": None,
                    "output_activations": None,
                }
                for number, (weights, names) in enumerate(kinds.values())
            },
            "ignore": [*conversion.plain_linears, *conversion.decoded],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def prepared(self, conversion: Conversion) -> Conversion:
        """Layers on one grid: transformers decodes zero points of all layers by the first, and vLLM fuses layers."""
        return on_one_grid(conversion)

    def layer_problem(self, layer: CarriedLayer) -> str | None:
        """Its readers quantize no head."""
        return "is the head, which readers of this format keep in 16 bits" if layer.group == "head" else None

    def how_to_load(self, conversion: Conversion, name: str) -> str:
        """Zero points are read by the path that decodes while loading."""
        lines = super().how_to_load(conversion, name)
        if all(layer.grid.symmetric for layer in conversion.coded.values()):
            return lines
        given = f'"{name}", quantization_config=CompressedTensorsConfig(dequantize=True))'
        lines = lines.replace(f'from_pretrained("{name}")', f"from_pretrained({given}")
        return lines.replace("from transformers import ", "from transformers import CompressedTensorsConfig, ")

    def notes(self, conversion: Conversion) -> list[str]:
        """Return the gaps of its readers."""
        bits = {layer.grid.bits for layer in conversion.coded.values()} - {4}
        found = super().notes(conversion)
        if bits:
            found.append(f"vLLM has kernels for 4 bits; layers of {min(bits)} bits are read by transformers.")
        if not all(layer.grid.symmetric for layer in conversion.coded.values()):
            found.append("transformers reads zero points with CompressedTensorsConfig(dequantize=True) only.")
            if len({layer.grid for layer in conversion.coded.values()}) > 1:
                found.append("transformers cannot read zero points of groups of several sizes.")
        return found


def _weights(layer: CarriedLayer) -> dict[str, Any]:
    per_channel = layer.grid.group_size == PER_CHANNEL
    return {
        "num_bits": layer.grid.bits,
        "type": "int",
        "symmetric": layer.grid.symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else layer.grid.group_size,
        "dynamic": False,
    }
