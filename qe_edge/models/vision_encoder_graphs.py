"""A vision encoder of transformers as a module for any number of pictures of one size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.family import GraphSpec
from qe_edge.models.vision_encoder import MAX_PICTURES

FEATURES = "last_hidden_state"
TYPICAL = 1  # pictures in engines
LARGEST = 1 << 16  # pictures at export time


class Encoder(nn.Module):
    """The features of transformers' own class; its attention is computed eagerly while it is traced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Pixels `[pictures, 3, height, width]` to features `[pictures, tokens, width]`."""
        output: Any = self.model(pixel_values=pixel_values)
        features: Tensor = output.last_hidden_state
        return features


def encoder_graph(model: nn.Module, size: tuple[int, int]) -> GraphSpec:
    """The graph "visual" for pictures of one height and width."""
    shape = (3, *size)
    return GraphSpec(
        name="visual",
        module=Encoder(model),
        inputs=(torch.zeros(2, *shape),),
        input_names=["pixel_values"],
        output_names=[FEATURES],
        dynamic_shapes=({0: Dim("pictures", min=1, max=LARGEST)},),
        profiles={"default": {"pixel_values": ((1, *shape), (TYPICAL, *shape), (MAX_PICTURES, *shape))}},
    )
