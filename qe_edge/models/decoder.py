"""The language model of any family as one graph for prefill and decode, with its KV cache going in and out."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers.cache_utils import DynamicCache

from qe_edge.models.export_limits import FULL, SLIDING, check_exportable, layer_kinds, window_of
from qe_edge.models.family import GraphSpec, Profile

MAX_BATCH = 4  # of engines; ONNX Runtime takes any
MAX_CONTEXT = 8192  # the larger, the more memory an engine needs
MAX_PREFILL = 4096  # a picture of 1920 x 1080 is 2691 tokens for Qwen2-VL, 13 tiles are 3328 for InternVL
LARGEST = 1 << 20  # of any dynamic size at export time


class Decoder(nn.Module):
    """A transformers text model and its head over a flat list of cached keys and values.

    Args:
        model: Text model that takes `inputs_embeds`, a float mask and a `Cache`.
        head: Projection to the vocabulary.
    """

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = head
        config: Any = model.config
        self.width = config.hidden_size  # of inputs_embeds

    def hidden_states(self, inputs_embeds: Tensor, **inputs: Any) -> Any:  # noqa: ANN401 - transformers' output
        """The text model's output."""
        return self.model(inputs_embeds=inputs_embeds, **inputs)

    def visible(self, attention_mask: Tensor, query: Tensor, key_index: Tensor) -> Tensor:  # noqa: ARG002 - of subclasses
        """Which places `key_index` `[keys]` the places `query` `[sequence]` may see; broadcasts to the scores."""
        return key_index[None, :] <= query[:, None]

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, attention_mask: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits of every position, then keys and values of every layer including the past.

        Args:
            inputs_embeds: `[batch, sequence, width]`.
            position_ids: `[batch, sequence]`, with leading axes where the family has them.
            attention_mask: `[batch, past + sequence]` int64, 0 on padding, as the family's `graph_mask`.
            past: Key and value `[batch, heads, past, head_dim]` of every layer.
        """
        cache = DynamicCache()  # which keeps all tokens of every layer; masks hide those outside of a window
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        query = torch.arange(inputs_embeds.shape[1]) + past[0].shape[2]
        key_index = torch.arange(attention_mask.shape[1])
        allowed = self.visible(attention_mask, query, key_index) & (attention_mask[:, None, None, :] != 0)
        config: Any = self.model.config
        window = window_of(config)
        near = allowed if window is None else allowed & (key_index[None, :] > query[:, None] - window)
        # the smallest number instead of -inf: rows of padding stay finite
        mask, near_mask = (torch.where(seen, 0.0, torch.finfo(inputs_embeds.dtype).min) for seen in (allowed, near))
        by_kind = {FULL: mask, SLIDING: near_mask}
        output = self.hidden_states(
            inputs_embeds,
            position_ids=position_ids,
            # models whose layers differ take a mask for each kind
            attention_mask=near_mask if not layer_kinds(config) else by_kind if window is not None else mask,
            past_key_values=cache,
            use_cache=True,
        )
        layers = output.past_key_values.layers
        present = itertools.chain.from_iterable((layer.keys, layer.values) for layer in layers)
        return self.head(output.last_hidden_state), *present


def decoder_graph(decoder: Decoder, position_axes: int = 0) -> GraphSpec:
    """The graph "language" of a text model.

    Args:
        decoder: Text model and head; attention must be computed eagerly while exporting.
        position_axes: Size of the leading axis of `position_ids` (3 for M-RoPE), 0 for none.

    Raises:
        ModelError: If its attention or its positions cannot be exported.
    """
    config: Any = decoder.model.config
    check_exportable(config)
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, sequence, past = 2, 3, 5  # sizes of the example; none is 0 or 1, which torch would take for constants
    axes = (position_axes,) if position_axes else ()
    cache = [torch.zeros(batch, heads, past, width) for _ in range(2 * layers)]
    inputs = (
        torch.zeros(batch, sequence, decoder.width),
        torch.zeros((*axes, batch, sequence), dtype=torch.int64),
        torch.ones(batch, past + sequence, dtype=torch.int64),
        cache,
    )
    dims = Dim("batch", min=1, max=LARGEST), Dim("sequence", min=1, max=LARGEST), Dim("past", min=0, max=LARGEST)
    shapes = (
        {0: dims[0], 1: dims[1]},
        {len(axes): dims[0], len(axes) + 1: dims[1]},
        {0: dims[0], 1: Dim.DYNAMIC},
        [{0: dims[0], 2: dims[2]} for _ in cache],
    )
    names = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return GraphSpec(
        name="language",
        module=decoder,
        inputs=inputs,
        input_names=["inputs_embeds", "position_ids", "attention_mask", *(f"past_key_values.{n}" for n in names)],
        output_names=["logits", *(f"present.{name}" for name in names)],
        dynamic_shapes=shapes,
        profiles=_profiles(config, decoder.width, axes, (heads, width), names),
    )


def default_lengths(config: Any) -> tuple[int, int]:  # noqa: ANN401 - transformers' configuration classes
    """Longest context and longest prompt of engines of a text model, unless the user asks for others."""
    context = min(config.max_position_embeddings, MAX_CONTEXT)
    return context, min(context, MAX_PREFILL)


def _profiles(
    config: Any,  # noqa: ANN401 - transformers' configuration classes
    embeds_width: int,
    axes: tuple[int, ...],
    head_shape: tuple[int, int],
    names: list[str],
) -> dict[str, Profile]:
    """Shapes for engines: prefill starts with an empty cache, decode adds one token."""
    context, prefill = default_lengths(config)
    sizes = {  # (batch, sequence, past) at the smallest, typical and largest
        "prefill": ((1, 1, 0), (1, prefill // 4, 0), (MAX_BATCH, prefill, 0)),
        "decode": ((1, 1, 1), (1, 1, context // 4), (MAX_BATCH, 1, context - 1)),
    }

    def shapes(batch: int, sequence: int, past: int) -> dict[str, tuple[int, ...]]:
        return {
            "inputs_embeds": (batch, sequence, embeds_width),
            "position_ids": (*axes, batch, sequence),
            "attention_mask": (batch, past + sequence),
            **{f"past_key_values.{name}": (batch, head_shape[0], past, head_shape[1]) for name in names},
        }

    profiles: dict[str, Profile] = {}
    for name, triple in sizes.items():
        smallest, typical, largest = (shapes(*size) for size in triple)
        profiles[name] = {key: (smallest[key], typical[key], largest[key]) for key in smallest}
    return profiles
