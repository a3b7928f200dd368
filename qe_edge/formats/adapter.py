"""The low-rank correction that is the same for every token, as a LoRA of PEFT."""

from __future__ import annotations

from typing import Any

import torch

from qe_edge.formats.base import Conversion
from qe_edge.formats.carried import Piece, piece

ADAPTER = "adapter"  # its folder, inside the model's: transformers would load one that lies beside config.json
PREFIX = "base_model.model."  # of PEFT's names


def adapter_pieces(conversion: Conversion) -> dict[str, Piece]:
    """Both factors of every layer that has some, float32, which holds codes times scales exactly.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     pieces = adapter_pieces(plan_conversion(source, FORMATS["gptq"]()))
        ...     print({name: tuple(one.like.shape) for name, one in pieces.items()})
    """
    found: dict[str, Piece] = {}
    for name, layer in conversion.corrected.items():
        geometry = layer.geometry
        found[f"{PREFIX}{name}.lora_A.weight"] = piece((layer.rank, geometry.in_features), torch.float32, layer.down)
        found[f"{PREFIX}{name}.lora_B.weight"] = piece((geometry.out_features, layer.rank), torch.float32, layer.up)
    return found


def adapter_config(conversion: Conversion, base: str) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA that adds `up @ down @ x`, without a factor.

    Args:
        conversion: The checkpoint; some of its layers have a correction.
        base: Name of the model's folder.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     print(adapter_config(plan_conversion(source, FORMATS["gptq"]()), base="converted")["r"])
    """
    ranks = {name: layer.rank for name, layer in conversion.corrected.items()}
    largest = max(ranks.values())
    others = {f"^{name.replace('.', chr(92) + '.')}$": rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,  # alpha / r is the factor: 1
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
