"""The language model of any family as one graph for prefill and decode, with its KV cache going in and out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from qe_edge.models.cached_attention import MULTIPLE, CachedAttention, attending
from qe_edge.models.cached_states import NewTokens
from qe_edge.models.export_limits import MAX_LOGITS, check_exportable, context_of, layer_config
from qe_edge.models.family import GraphSpec, Profile
from qe_edge.models.layer_states import CAPACITY, head_width, layer_states
from qe_edge.models.linear_attention import remembering

MAX_BATCH = 4  # of engines; ONNX Runtime takes any
MAX_CONTEXT = 8192  # the larger, the more memory an engine needs
MAX_PREFILL = 4096  # a picture of 1920 x 1080 is 2691 tokens for Qwen2-VL, 13 tiles are 3328 for InternVL
LARGEST = 1 << 20  # of any dynamic size at export time


class Decoder(nn.Module):
    """A transformers text model and its head over a flat list of the tensors that its layers keep.

    Class attributes:
        pictures: Whether tokens of a picture see each other; then the mask numbers pictures from 2.

    Args:
        model: Text model that takes `inputs_embeds`, a float mask and a `Cache`.
        head: Projection to the vocabulary.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> model = load_model("demo").model
        >>> decoder = Decoder(model.get_decoder(), model.get_output_embeddings())
        >>> decoder.width, decoder.in_place
        (256, True)
    """

    pictures: bool = False

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = head
        config: Any = model.config
        self.width = config.hidden_size  # of inputs_embeds

    @property
    def in_place(self) -> bool:
        """Whether the graph can write its cache in place: ONNX Runtime has a kernel for its attention."""
        config: Any = self.model.config
        widths = [head_width(layer_config(config, layer)) for layer in range(config.num_hidden_layers)]
        return not self.pictures and all(width % MULTIPLE == 0 for width in widths)

    @property
    def picture_layers(self) -> Collection[int]:
        """Numbers of the layers in which the tokens of a picture see each other."""
        config: Any = self.model.config
        return range(config.num_hidden_layers) if self.pictures else ()

    def hidden_states(self, inputs_embeds: Tensor, **inputs: Any) -> Any:  # noqa: ANN401 - transformers' output
        """The text model's output."""
        return self.model(inputs_embeds=inputs_embeds, **inputs)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
        logit_positions: Tensor,
    ) -> tuple[Tensor, ...]:
        """Logits of the asked positions, then the tensors of every layer's cache after the new tokens.

        Args:
            inputs_embeds: `[batch, sequence, width]`; a row's new tokens first, then padding.
            position_ids: `[batch, sequence]`, with leading axes where the family has them.
            attention_mask: `[batch, total]` int64: a row's tokens, cached and new, then zeros; as `graph_mask`.
            past: The tensors that `layer_states` lists. Of keys and values `[batch, kv_heads, capacity, head_dim]`
                nothing beyond a row's tokens is read.
            logit_positions: `[batch, asked]` int64, which of the `sequence` new tokens logits are wanted of.
        """
        config: Any = self.model.config
        kept = {state.name: tensor for state, tensor in zip(layer_states(config), past, strict=True)}
        attention = CachedAttention(config, kept, attention_mask, self.picture_layers, not self.in_place)
        tokens = NewTokens(kept, attention_mask, inputs_embeds.shape[1])
        with attending(self.model, attention), remembering(self.model, tokens):
            output = self.hidden_states(
                inputs_embeds,
                position_ids=position_ids,
                attention_mask=inputs_embeds.new_zeros(1, 1, 1, 1),  # transformers keeps a mask of four axes as it is
                past_key_values=tokens,
                use_cache=True,
            )
        hidden = output.last_hidden_state
        places = logit_positions[..., None].expand(-1, -1, hidden.shape[-1])
        present = {**kept, **attention.present, **tokens.present}
        return self.head(hidden.gather(1, places)), *present.values()


def decoder_graph(decoder: Decoder, position_axes: int = 0) -> GraphSpec:
    """The graph "language" of a text model.

    Args:
        decoder: Text model and head; attention must be computed eagerly while exporting.
        position_axes: Size of the leading axis of `position_ids` (3 for M-RoPE), 0 for none.

    Raises:
        ModelError: If its attention or its positions cannot be exported.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> model = load_model("demo").model
        >>> graph = decoder_graph(Decoder(model.get_decoder(), model.get_output_embeddings()), position_axes=3)
        >>> graph.name, graph.input_names[:3], len(graph.output_names)
        ('language', ['inputs_embeds', 'position_ids', 'attention_mask'], 9)
    """
    config: Any = decoder.model.config
    check_exportable(config)
    states = layer_states(config)
    # sizes of the example; all differ, and none is 0 or 1, which torch would take for constants
    batch, sequence, total, capacity, asked = 2, 3, 7, 9, 4
    axes = (position_axes,) if position_axes else ()
    cache = [torch.zeros(state.sizes(batch, capacity)) for state in states]
    inputs = (
        torch.zeros(batch, sequence, decoder.width),
        torch.zeros((*axes, batch, sequence), dtype=torch.int64),
        torch.ones(batch, total, dtype=torch.int64),
        cache,
        torch.zeros(batch, asked, dtype=torch.int64),
    )
    rows, tokens, *others = (
        Dim(name, min=1, max=LARGEST) for name in ("batch", "sequence", "total", "capacity", "asked")
    )
    shapes = (
        {0: rows, 1: tokens},
        {len(axes): rows, len(axes) + 1: tokens},
        {0: rows, 1: others[0]},
        [
            {0: rows, **({1 + state.shape.index(CAPACITY): others[1]} if CAPACITY in state.shape else {})}
            for state in states
        ],
        {0: rows, 1: others[2]},
    )
    past = [f"past_key_values.{state.name}" for state in states]
    return GraphSpec(
        name="language",
        module=decoder,
        inputs=inputs,
        input_names=["inputs_embeds", "position_ids", "attention_mask", *past, "logit_positions"],
        output_names=["logits", *(f"present.{state.name}" for state in states)],
        dynamic_shapes=shapes,
        profiles=_profiles(config, decoder.width, axes),
    )


def default_lengths(config: Any) -> tuple[int, int]:  # noqa: ANN401 - transformers' configuration classes
    """Longest context and longest prompt of engines of a text model, unless the user asks for others.

    Example:
        >>> from transformers import LlamaConfig
        >>> default_lengths(LlamaConfig(max_position_embeddings=131_072))
        (8192, 4096)
    """
    context = min(context_of(config), MAX_CONTEXT)
    return context, min(context, MAX_PREFILL)


def _profiles(
    config: Any,  # noqa: ANN401 - transformers' configuration classes
    embeds_width: int,
    axes: tuple[int, ...],
) -> dict[str, Profile]:
    """Shapes for engines: a prompt into a cache of the context's size, and one token after the other."""
    context, prefill = default_lengths(config)
    states, middle, asked = layer_states(config), prefill // 4, min(prefill, MAX_LOGITS)
    sizes = {  # (batch, sequence, total, capacity, asked) at the smallest, typical and largest
        "prefill": ((1, 1, 1, 1, 1), (1, middle, middle, context, 1), (MAX_BATCH, prefill, prefill, context, asked)),
        "decode": ((1, 1, 1, 1, 1), (1, 1, context // 4, context, 1), (MAX_BATCH, 1, context, context, 1)),
    }

    def shapes(batch: int, sequence: int, total: int, capacity: int, asked: int) -> dict[str, tuple[int, ...]]:
        return {
            "inputs_embeds": (batch, sequence, embeds_width),
            "position_ids": (*axes, batch, sequence),
            "attention_mask": (batch, total),
            **{f"past_key_values.{state.name}": state.sizes(batch, capacity) for state in states},
            "logit_positions": (batch, asked),
        }

    profiles: dict[str, Profile] = {}
    for name, triple in sizes.items():
        smallest, typical, largest = (shapes(*size) for size in triple)
        profiles[name] = {key: (smallest[key], typical[key], largest[key]) for key in smallest}
    return profiles
