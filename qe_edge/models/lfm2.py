"""LFM2 of transformers: short convolutions and grouped attention, text in, text out."""

from __future__ import annotations

from typing import ClassVar

from qe_edge.models.causal_lm import CausalLM

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("w1", "w3"))


class Lfm2(CausalLM):
    """A language model most of whose layers keep the last inputs of a convolution instead of keys and values.

    Example:
        >>> from transformers import Lfm2Config
        >>> Lfm2(Lfm2Config()).siblings[1]  # layers that read the same input
        ('w1', 'w3')
    """

    model_type = "lfm2"
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = SIBLINGS
