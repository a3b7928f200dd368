"""One call of a Qwen-VL model's vision encoder for the pictures and the videos of a batch, as calibration needs it."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def see_at_once(model: nn.Module) -> None:
    """Let a model encode pictures and videos in one call; it computes the same.

    Example:
        >>> from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
        >>> few = {"text_config": {"num_hidden_layers": 1}, "vision_config": {"depth": 1}}
        >>> with torch.device("meta"):
        ...     model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**few))
        >>> see_at_once(model)
        >>> model.model.forward.__name__
        '_forward'
    """
    inner = next(module for module in model.modules() if "visual" in dict(module.named_children()))
    inner.__dict__["forward"] = MethodType(_forward, inner)  # a copied model calls its own parts


def _forward(
    self: Any,  # noqa: ANN401 - transformers' own class
    *,
    pixel_values: Tensor | None = None,
    pixel_values_videos: Tensor | None = None,
    **options: Any,  # noqa: ANN401 - transformers' own
) -> Any:  # noqa: ANN401
    """`forward` of the model, in which the vision encoder's first call, of pictures, encodes the videos too."""
    shown = {"pixel_values": pixel_values, "pixel_values_videos": pixel_values_videos}
    if pixel_values is None or pixel_values_videos is None:
        return type(self).forward(self, **shown, **options)
    visual, waiting = self.visual, list[Any]()
    grids = torch.cat([options["image_grid_thw"], options["video_grid_thw"]])

    def encode(pixels: Tensor, **arguments: Any) -> Any:  # noqa: ANN401
        if not waiting:
            both = torch.cat([pixels, pixel_values_videos.to(pixels)])
            found = type(visual).forward(visual, both, **{**arguments, "grid_thw": grids})
            waiting.extend(_part(found, len(pixels), len(both), first=first) for first in (True, False))
        return waiting.pop(0)

    visual.__dict__["forward"] = encode
    try:
        return type(self).forward(self, **shown, **options)
    finally:
        del visual.__dict__["forward"]


def _part(found: Any, patches: int, every: int, *, first: bool) -> Any:  # noqa: ANN401 - what the encoder returns
    """Of a table of outputs, in rows of patches or of tokens, those of the first of `every` patches, or the others."""
    if isinstance(found, Tensor):
        rows = len(found) * patches // every
        return found[:rows] if first else found[rows:]
    if isinstance(found, list | tuple):
        return [_part(one, patches, every, first=first) for one in found]
    parts = {name: _part(one, patches, every, first=first) for name, one in found.items() if one is not None}
    return type(found)(**parts)
