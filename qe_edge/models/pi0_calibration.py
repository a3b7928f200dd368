"""One forward pass of pi0 in which every block runs once, for calibration.

The action expert sees every sample at all steps of denoising: at time t it reads t * noise + (1 - t) * actions, as it
was trained to (Black et al. 2024, section IV). The steps are rows of one batch, so that the prompt is read once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qe_edge.models.pi0_graphs import ActionStep, Prefix, Read, Written
from qe_edge.models.robot import times

if TYPE_CHECKING:
    from qe_edge.models.family import Encoded, ModelFamily

KEPT = "prompt"


def run_blocks(family: ModelFamily, model: Any, encoded: Encoded, kept: dict[str, Any]) -> None:  # noqa: ANN401
    """Run a batch that was encoded with its actions.

    Args:
        family: The model's family.
        model: A `PI0ForConditionalGeneration`.
        encoded: The batch.
        kept: The keys and values of its prompts: the blocks of the language model write them, and those of the action
            expert read them, perhaps in another pass.
    """
    written: Written = kept.setdefault(KEPT, Written())
    inputs = family.torch_inputs(encoded)
    mask = inputs["attention_mask"]
    embeds = model.model.embed_prefix(inputs["input_ids"], inputs["pixel_values"], inputs["pixel_attention_mask"])
    positions = torch.from_numpy(family.position_ids(encoded))
    Prefix(model.model.vlm.language_model).write(embeds, positions, mask, written)
    steps = times(model.config.num_inference_steps)
    noise, actions = (torch.from_numpy(encoded.pixels[name]) for name in ("noise", "actions"))
    moments = torch.from_numpy(steps).repeat(len(noise))
    at = moments[:, None, None]
    repeated = [_rows(part, len(steps)) for part in (inputs["state"], noise, actions, mask)]
    state, noise, actions, mask = repeated
    noisy = at * noise + (1 - at) * actions
    ActionStep(model).velocity(state, noisy, moments, mask, Read(written.layers, len(steps)))


def _rows(part: Tensor, count: int) -> Tensor:
    """Every row `count` times, one after the other."""
    return part.repeat_interleave(count, 0)
