"""The format of AutoGPTQ and GPTQModel: codes along the input channels in words of 32 bits, transposed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from qe_edge.formats.base import Conversion, Reason
from qe_edge.formats.carried import CarriedLayer, Piece, piece
from qe_edge.formats.grids import on_one_grid
from qe_edge.formats.transformers_folder import TransformersFolder
from qe_edge.formats.words import packed_words, words_in
from qe_edge.numerics.grids import PER_CHANNEL
from qe_edge.system.version import VERSION

UNIT = 32  # channels on either side that kernels take together
NUMBER = re.compile(r"\.\d+\.")


class GPTQ(TransformersFolder):
    """The format for vLLM, and for transformers with GPTQModel and optimum: one grid for the language model's blocks.

    Zero points are stored less one ("gptq") where every one is the middle of the grid, and as they are ("gptq_v2")
    elsewhere: a zero point of 0 has no place in the first.

    Example:
        >>> GPTQ().folds_rows  # channel scales of later layers have no place: its scales are float16
        False
    """

    folds_rows: ClassVar[bool] = False  # its scales are float16
    reader: ClassVar[str] = "vLLM, GPTQModel, and transformers with the packages gptqmodel and optimum"

    def prepared(self, conversion: Conversion) -> Conversion:
        """Layers on one grid; what is decoded in one block is in all, since blocks are described once."""
        decoded = {_inside(name) for name in conversion.decoded}
        layers = {
            name: replace(layer, decoded=True) if _inside(name) in decoded else layer
            for name, layer in conversion.layers.items()
        }
        return on_one_grid(replace(conversion, layers=layers))

    def check(self, conversion: Conversion) -> list[Reason]:
        """One grid must hold all layers."""
        if len({layer.grid for layer in conversion.coded.values()}) < 2:
            return []
        return [("its groups have no common size of at least 32", "Choose --to compressed-tensors.")]

    def layer_problem(self, layer: CarriedLayer) -> str | None:
        """Only blocks of the language model, of sizes that kernels take."""
        if layer.group != "language":
            return "is outside the blocks of the language model"
        if layer.geometry.in_features % UNIT or layer.geometry.out_features % UNIT:
            return f"has sizes that are no multiples of {UNIT}"
        return None

    def layer_pieces(self, layer: CarriedLayer) -> dict[str, Piece]:
        """`qweight` `[in * bits / 32, out]`, `qzeros` `[groups, out * bits / 32]`, `scales` and `g_idx`."""
        name, bits, groups = layer.name, layer.grid.bits, layer.groups
        in_features, out_features = layer.geometry.in_features, layer.geometry.out_features
        less = 1 if layer.grid.symmetric else 0

        def zeros() -> Tensor:
            return packed_words((layer.zeros() - less).T.contiguous(), bits)

        def numbers() -> Tensor:
            return torch.arange(groups, dtype=torch.int32).repeat_interleave(in_features // groups)

        return {
            f"{name}.qweight": piece(
                (words_in(in_features, bits), out_features), torch.int32, lambda: packed_words(layer.codes(), bits).T
            ),
            f"{name}.qzeros": piece((groups, words_in(out_features, bits)), torch.int32, zeros),
            f"{name}.scales": piece((groups, out_features), torch.float16, lambda: layer.scales().T),
            f"{name}.g_idx": piece((in_features,), torch.int32, numbers),
        }

    def quantization_config(self, conversion: Conversion) -> dict[str, Any]:
        """One grid, the layers of a block that have it, and by `dynamic` those of other parts that do not."""
        coded = conversion.coded
        grid = next(iter(coded.values())).grid
        version = "gptq" if grid.symmetric else "gptq_v2"
        plain = {NUMBER.split(name.removeprefix("model."))[0] for name in conversion.plain_linears}
        return {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": PER_CHANNEL if grid.group_size == PER_CHANNEL else grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "true_sequential": True,
            "lm_head": False,
            "checkpoint_format": version,
            "format": version,
            "block_name_to_quantize": NUMBER.split(next(iter(coded)))[0],
            "modules_in_block_to_quantize": [sorted({_inside(name) for name in coded})],
            "dynamic": {f"-:.*{re.escape(name)}.*": {} for name in sorted(plain)},
            "meta": {"quantizer": [f"qe-edge:{VERSION}"]},
        }

    def notes(self, conversion: Conversion) -> list[str]:
        """Which of the two versions was written."""
        if all(layer.grid.symmetric for layer in conversion.coded.values()):
            return super().notes(conversion)
        return [
            *super().notes(conversion),
            "Zero points are stored as they are: 'gptq_v2', which needs a reader that knows it.",
        ]


def _inside(name: str) -> str:
    """A layer's name within its block.

    Example:
        >>> _inside("model.layers.3.mlp.up_proj")
        'mlp.up_proj'
    """
    return NUMBER.split(name)[-1]
