"""Gemma 4's projection, and its decoder, whose input holds a second embedding of every token."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.export_limits import SLIDING
from qe_edge.models.family import GraphSpec
from qe_edge.models.gemma4_vision import merger_graph, visual_graph
from qe_edge.models.softcap import head_of


class Projection(nn.Module):
    """A `Gemma4MultimodalEmbedder`: what stands at a picture's tokens in the decoder's input.

    Args:
        embedder: The projection.
        text: The text model; a picture's tokens have its second embedding of padding.
    """

    def __init__(self, embedder: nn.Module, text: Any) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__()
        self.embedder = embedder
        self.scale, *layered = factors(text)
        padding = text.embed_tokens_per_layer.weight[text.config.pad_token_id] if layered else torch.zeros(0)
        self.padding = nn.Buffer(padding.detach().float())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Soft tokens `[groups, width]` to features `[groups, hidden + layers * hidden_per_layer]`."""
        features = self.embedder(hidden_states.unsqueeze(0)).squeeze(0) / self.scale
        return torch.cat([features, self.padding.expand(features.shape[0], -1)], dim=-1)


class LayeredDecoder(Decoder):
    """A `Gemma4TextModel` whose `inputs_embeds` hold both embeddings, `[batch, sequence, hidden + layers * per_layer]`.

    They are as the checkpoint stores them; the graph multiplies them by the model's factors.
    """

    def __init__(self, model: Any, head: nn.Module) -> None:  # noqa: ANN401 - transformers' own class
        super().__init__(model, head)
        config = model.config
        self.pictures = config.use_bidirectional_attention == "vision"
        self.width += config.num_hidden_layers * config.hidden_size_per_layer_input
        self.factors = factors(model)

    @property
    def picture_layers(self) -> Collection[int]:
        """Sliding-window layers alone, where a picture's tokens see each other at all."""
        config: Any = self.model.config
        return [layer for layer, kind in enumerate(config.layer_types) if self.pictures and kind == SLIDING]

    def hidden_states(self, inputs_embeds: Tensor, **inputs: Any) -> Any:  # noqa: ANN401 - transformers' output
        """The text model's output."""
        model: Any = self.model
        config, further = model.config, {}
        embeds = inputs_embeds[..., : config.hidden_size] * self.factors[0]
        if config.hidden_size_per_layer_input:
            shape = (config.num_hidden_layers, config.hidden_size_per_layer_input)
            layered: Any = inputs_embeds[..., config.hidden_size :]
            further["per_layer_inputs"] = layered.unflatten(-1, shape) * self.factors[1]
        return model(inputs_embeds=embeds, **further, **inputs)


def factors(text: Any) -> list[float]:  # noqa: ANN401 - transformers' own class
    """What a graph multiplies embeddings by: both of them, or the one, which the export has multiplied, by 1."""
    if not text.config.hidden_size_per_layer_input:
        return [1.0]
    return [float(table.embed_scale) for table in (text.embed_tokens, text.embed_tokens_per_layer)]


def embedder_of(model: nn.Module) -> nn.Module:
    """The projection of pictures, of a model that may have one of sounds too."""
    found: Any = next(module for module in model.modules() if type(module).__name__ == "Gemma4Model")
    projection: nn.Module = found.embed_vision
    return projection


def graphs(model: Any) -> list[GraphSpec]:  # noqa: ANN401 - transformers' own class
    """All graphs of a model."""
    by_class = {type(module).__name__: module for module in model.modules()}
    vision, text = by_class["Gemma4VisionModel"], by_class["Gemma4TextModel"]
    return [
        visual_graph(vision),
        merger_graph(Projection(embedder_of(model), text), vision.config.hidden_size),
        decoder_graph(LayeredDecoder(text, head_of(model))),
    ]
