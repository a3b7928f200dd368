"""The models that are compared, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.errors import ModelError
from qe_edge.linear import QELinear
from qe_edge.models.family import Encoded
from qe_edge.models.loading import LoadedModel


class Subject(Protocol):
    """A model that is evaluated: PyTorch or a built engine."""

    def logits(self, encoded: Encoded) -> np.ndarray:
        """Logits float32 `[batch, sequence, vocabulary]`."""

    def generate_ids(self, encoded: Encoded, max_new_tokens: int) -> Sequence[Sequence[int]]:
        """Greedy continuation of every sample; what follows an end token is ignored."""


class TorchSubject:
    """A PyTorch model as a subject; computes in the precision that its weights have.

    Args:
        loaded: The model.

    Raises:
        ModelError: If it writes no text.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        if not loaded.family.writes_text:
            raise ModelError(
                f"A '{loaded.family.model_type}' model writes no text, so it has no answers to compare.",
                "Compare its features: qe_edge.validate.features.",
            )
        self._loaded = loaded

    def logits(self, encoded: Encoded) -> np.ndarray:
        """Logits float32 `[batch, sequence, vocabulary]`."""
        with torch.no_grad():
            output = self._loaded.model(**self._loaded.family.torch_inputs(encoded), use_cache=False)
        logits: Tensor = output.logits
        return logits.float().numpy()

    def generate_ids(self, encoded: Encoded, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of every sample."""
        inputs = self._loaded.family.torch_inputs(encoded)
        generate: Any = self._loaded.model.generate
        with torch.no_grad():
            tokens: Tensor = generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
            )
        return tokens[:, encoded.input_ids.shape[1] :].tolist()


def block_groups(loaded: LoadedModel) -> dict[str, str]:
    """Group of every block by its dotted name."""
    return {block.name: block.group for block in loaded.family.blocks(loaded.model)}


def in_float32(loaded: LoadedModel) -> LoadedModel:
    """Convert a model in place to compute in float32; the tensors of quantized layers stay as they are stored."""

    def convert(module: nn.Module) -> None:
        if isinstance(module, QELinear):
            module.keep_decoded(keep=True)
            return
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        for child in module.children():
            convert(child)

    convert(loaded.model)
    return loaded
