"""What the layers of a text model keep of the tokens that they have read, as named tensors of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qe_edge.models.export_limits import CONV, LINEAR, layer_config

CAPACITY = -1  # the size of an axis that has room for every token of a context


@dataclass(frozen=True)
class LayerState:
    """One tensor of a layer's cache.

    Attributes:
        layer: Number of the layer.
        part: "key" or "value" of an attention layer, "conv" for the last inputs of a convolution,
            "recurrent" for the matrices of the gated delta rule.
        shape: Sizes behind the batch's; `CAPACITY` where it grows with the context.
    """

    layer: int
    part: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in a graph, without `past_key_values.` or `present.`."""
        return f"{self.layer}.{self.part}"

    def sizes(self, batch: int, capacity: int) -> tuple[int, ...]:
        """Its shape for a batch and a capacity."""
        return (batch, *(capacity if size == CAPACITY else size for size in self.shape))


def layer_states(config: Any) -> list[LayerState]:  # noqa: ANN401 - transformers' configuration classes
    """All tensors of a text model's cache, layer by layer.

    A layer of attention keeps keys and values `[kv_heads, capacity, head_dim]`; a short convolution keeps its last
    inputs `[hidden_size, kernel - 1]`, whatever the length of the text. A gated delta rule keeps those of its own
    convolution, and a matrix for each head. A layer that reads the keys and values of an earlier one keeps nothing.

    Example:
        >>> from transformers import Lfm2Config
        >>> config = Lfm2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        ...                     layer_types=["conv", "full_attention"])
        >>> [(state.name, state.sizes(batch=1, capacity=8)) for state in layer_states(config)]
        [('0.conv', (1, 64, 2)), ('1.key', (1, 2, 8, 16)), ('1.value', (1, 2, 8, 16))]
    """
    kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
    found: list[LayerState] = []
    for layer, kind in enumerate(kinds[: config.num_hidden_layers]):
        if kind == LINEAR:
            widths, heads = (config.linear_key_head_dim, config.linear_value_head_dim), config.linear_num_value_heads
            channels = 2 * config.linear_num_key_heads * widths[0] + heads * widths[1]
            found.append(LayerState(layer, "conv", (channels, config.linear_conv_kernel_dim - 1)))
            found.append(LayerState(layer, "recurrent", (heads, *widths)))
        elif kind == CONV:
            found.append(LayerState(layer, "conv", (config.hidden_size, config.conv_L_cache - 1)))
        elif keeper_of(config, layer) == layer:
            own = layer_config(config, layer)
            grown = (own.num_key_value_heads, CAPACITY, head_width(own))
            found += [LayerState(layer, part, grown) for part in ("key", "value")]
    return found


def keeper_of(config: Any, layer: int) -> int:  # noqa: ANN401 - transformers' configuration classes
    """The layer whose keys and values a layer of attention reads: in Gemma 4 an earlier one, in other models itself.

    Example:
        >>> from transformers import Gemma4TextConfig
        >>> kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
        >>> config = Gemma4TextConfig(num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2)
        >>> [keeper_of(config, layer) for layer in range(4)]
        [0, 1, 0, 1]
    """
    own = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    if layer < own:
        return layer
    return max(number for number in range(own) if config.layer_types[number] == config.layer_types[layer])


def head_width(config: Any) -> int:  # noqa: ANN401 - transformers' configuration classes
    """Width of a head of keys and values.

    Example:
        >>> from transformers import LlamaConfig
        >>> head_width(LlamaConfig(hidden_size=576, num_attention_heads=9))
        64
    """
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
