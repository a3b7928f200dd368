"""Models of random weights whose answers depend on every one of them, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig


def save_random_model(
    model_class: Any,  # noqa: ANN401 - a class or a function of transformers
    config: PreTrainedConfig,
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
    folder: Path,
    norms: tuple[float, float],
    attention: tuple[float, float] | None = None,
) -> None:
    """A model in bfloat16 with its tokenizer; weights are the same for a configuration.

    Args:
        model_class: What the configuration is called with.
        config: Of the model.
        tokenizer: Its end token ends answers.
        folder: Where to write.
        norms: Range of the weights of norms.
        attention: Of those of queries and keys, where another; without a factor on their products, large ones make
            attention so sharp that a rounding changes an answer.
    """
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            # a convolution of four inputs, whose outputs a norm divides by their size, has larger weights
            nn.init.normal_(parameter, std=0.5 if "conv1d" in name else 0.12)
        elif attention is not None and name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.uniform_(parameter, *attention)
        elif "A_log" in name:  # matrices that remember tens of tokens: of one alone a norm magnifies what cancels
            nn.init.uniform_(parameter, -4, -2)
        else:
            nn.init.uniform_(parameter, *norms)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
