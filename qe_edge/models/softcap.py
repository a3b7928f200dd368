"""Logits that are kept below a bound, as Gemma 2 has them: a part of the head in exported graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CappedHead(nn.Module):
    """A projection to the vocabulary, then `cap * tanh(logits / cap)` (Bello et al. 2016, section 5.1).

    Args:
        head: The projection.
        cap: The bound.

    Example:
        >>> import torch
        >>> head = CappedHead(nn.Identity(), cap=30.0)
        >>> head(torch.tensor([1.0, 30.0, 1000.0]))
        tensor([ 0.9996, 22.8478, 30.0000])
    """

    def __init__(self, head: nn.Module, cap: float) -> None:
        super().__init__()
        self.head = head
        self.cap = cap

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., hidden]` to logits `[..., vocabulary]`."""
        logits: Tensor = self.head(hidden_states)
        return self.cap * (logits / self.cap).tanh()


def head_of(model: PreTrainedModel) -> nn.Module:
    """Return the module that makes a model's logits: its head, with the cap if there is one.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> type(head_of(load_model("demo").model)).__name__  # Gemma 2 has a CappedHead
        'Linear'
    """
    head: nn.Module = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return head if cap is None else CappedHead(head, cap)
