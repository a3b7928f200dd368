"""How much more or less an error on image tokens costs than one on answer tokens (MBQ, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import nn

from qe_edge.calibration.sensitivity import Sensitivity
from qe_edge.models.family import Block
from qe_edge.system.errors import CalibrationError

Part = Literal["attention", "mlp"]


def speakers(block: Block) -> dict[str, tuple[Part, str]]:
    """For every linear layer of a block its part, and the layer whose gradients speak for the part: the last of it."""
    linears = [name for name, module in block.module.named_modules() if isinstance(module, nn.Linear)]
    last: dict[Part, str] = {_part(name): f"{block.name}.{name}" for name in linears}
    return {f"{block.name}.{name}": (_part(name), last[_part(name)]) for name in linears}


def modality_ratios(blocks: Sequence[Block], measured: Mapping[str, Sensitivity]) -> dict[str, float]:
    """MBQ's lambda for every linear layer of the language blocks.

    The mean |gradient| on image tokens over that on answer tokens, at the last layer of the block's attention or MLP,
    and at least the median of that over the blocks. It is 1 where no token is an image's.

    Args:
        blocks: Blocks of the model; those of other groups see one modality and are left out.
        measured: Sensitivities, at least of the layers that `speakers` names.

    Raises:
        CalibrationError: If there are image tokens but no answer.
    """
    spoken = {name: pair for block in blocks if block.group == "language" for name, pair in speakers(block).items()}
    own = {name: _ratio(measured[speaker]) for name, (_, speaker) in spoken.items()}
    floors: dict[Part, float] = {}
    for part in {part for part, _ in spoken.values()}:
        chosen = {speaker: own[speaker] for other, speaker in spoken.values() if other == part}
        floors[part] = float(np.median(list(chosen.values())))
    return {name: max(own[speaker], floors[part]) for name, (part, speaker) in spoken.items()}


def _ratio(one: Sensitivity) -> float:
    if one.vision == 0:
        return 1.0
    if one.answer == 0:
        raise CalibrationError(
            "Image tokens cannot be weighed against answers: no calibration sample has an answer.",
            "Give the samples answers, or choose another method, for example awq.",
        )
    return one.vision / one.answer


def _part(name: str) -> Part:
    return "attention" if "attn" in name or "attention" in name else "mlp"
