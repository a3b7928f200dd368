"""What transformers' layers take for their cache while a language graph is traced."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


class NewTokens(DynamicCache):
    """Hands a layer its new keys and values alone, which a node joins with the cache, and keeps states of fixed size.

    A row's new tokens are the first of a call, and padding follows them. States are those after a row's last token.

    Args:
        past: Tensors by name, as "0.conv" `[batch, channels, kernel - 1]`.
        attention_mask: `[batch, total]` int64: a row's tokens, the new ones included, then zeros.
        sequence: Number of new tokens of a row, with its padding.

    Attributes:
        present: States after the new tokens, by name; filled by the calls.

    Example:
        >>> inputs = torch.tensor([[[3.0, 4.0, 0.0]]])  # of one channel; two tokens, and padding
        >>> cache = NewTokens({"0.conv": torch.tensor([[[1.0, 2.0]]])}, torch.tensor([[1, 1, 0]]), sequence=3)
        >>> cache.update_conv_state(inputs, 0)
        tensor([[[1., 2., 3., 4., 0.]]])
        >>> cache.present["0.conv"]
        tensor([[[3., 4.]]])
    """

    def __init__(self, past: dict[str, Tensor], attention_mask: Tensor, sequence: int) -> None:
        super().__init__()
        self.past = past
        self._sequence = sequence
        self.present: dict[str, Tensor] = {}
        self._layer = 0
        # all of a row's tokens are new ones, or its new ones fill the sequence
        self._new = torch.minimum((attention_mask != 0).sum(1), torch.full((1,), sequence, dtype=torch.int64))

    def update(
        self, key_states: Tensor, value_states: Tensor, *_arguments: object, **_keywords: object
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values."""
        return key_states, value_states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:  # noqa: ARG002 - transformers' names
        """None: `update_conv_state` joins the state with the new inputs."""
        return None

    @property
    def real(self) -> Tensor:
        """Which new tokens are no padding, bool `[batch, sequence]`."""
        return torch.arange(self._sequence) < self._new[:, None]

    @property
    def recurrent(self) -> Tensor:
        """The matrices `[batch, heads, key width, value width]` of the layer that asked last."""
        return self.past[f"{self._layer}.recurrent"]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:  # noqa: ARG002 - as above
        """None: the node of the layer takes `recurrent`."""
        self._layer = layer_idx
        return None

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *_arguments: object, **_keywords: object
    ) -> Tensor:
        """Keep the matrices after the new tokens."""
        self.present[f"{layer_idx}.recurrent"] = recurrent_states
        return recurrent_states

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, *_arguments: object, **_keywords: object
    ) -> Tensor:
        """The last inputs of a convolution and its new ones, `[batch, channels, kernel - 1 + sequence]`."""
        name = f"{layer_idx}.conv"
        past = self.past[name]
        joined = torch.cat([past, conv_states], dim=-1)
        places = self._new[:, None, None] + torch.arange(past.shape[-1])
        self.present[name] = joined.gather(-1, places.expand(-1, past.shape[1], -1))
        return joined
