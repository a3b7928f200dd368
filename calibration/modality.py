"""The cost of an error on image tokens, relative to the cost on answer tokens (MBQ, CVPR 2025)."""

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
    """For every linear layer of a block its part, and the last layer of that part, whose gradients count for it.

    Example:
        >>> attention = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "o_proj": nn.Linear(4, 4)})
        >>> block = Block("layers.0", nn.ModuleDict({"self_attn": attention}), group="language")
        >>> speakers(block)
        {'layers.0.self_attn.q_proj': ('attention', 'layers.0.self_attn.o_proj'), 'layers.0.self_attn.o_proj':
        ('attention', 'layers.0.self_attn.o_proj')}
    """
    linears = [name for name, module in block.module.named_modules() if isinstance(module, nn.Linear)]
    last: dict[Part, str] = {_part(name): f"{block.name}.{name}" for name in linears}
    return {f"{block.name}.{name}": (_part(name), last[_part(name)]) for name in linears}


def modality_ratios(blocks: Sequence[Block], measured: Mapping[str, Sensitivity]) -> dict[str, float]:
    """MBQ's lambda for every linear layer of the language blocks.

    Lambda is the mean |gradient| on image tokens divided by the mean |gradient| on answer tokens, at the last layer of
    the block's attention or MLP. It is at least the median over the blocks, and 1 where there are no image tokens.

    Args:
        blocks: Blocks of the model. Blocks of other groups see one modality and are left out.
        measured: Sensitivities, at least of the layers that `speakers` names.

    Raises:
        CalibrationError: If there are image tokens but no answer.

    Example:
        >>> block = Block("layers.0", nn.ModuleDict({"mlp": nn.Linear(4, 4)}), group="language")
        >>> measured = Sensitivity(vision=0.1, answer=0.4, energy=1.0, channels=np.ones(4, np.float32), tokens=9)
        >>> modality_ratios([block], {"layers.0.mlp": measured})
        {'layers.0.mlp': 0.25}
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
