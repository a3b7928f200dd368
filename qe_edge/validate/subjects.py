"""The models that are compared, behind one interface; all decode by the same settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from qe_edge.layers.linear import QELinear, quantized_linears
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Encoded
from qe_edge.models.free_memory import check_free
from qe_edge.models.loading import LoadedModel, load_outside_blocks
from qe_edge.models.stored import StoredWeights
from qe_edge.runtime.generation import GenerationSettings, adjust_logits, check_context, check_finite, settings_of
from qe_edge.system.errors import ModelError
from qe_edge.system.heap import trim_heap


class Subject(Protocol):
    """A model that is evaluated: PyTorch or a built engine.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> subject: Subject = TorchSubject(load_model("demo"))
    """

    def logits(self, encoded: Encoded) -> np.ndarray:
        """Logits float32 `[batch, sequence, vocabulary]`."""

    def generate_ids(self, encoded: Encoded, max_new_tokens: int) -> Sequence[Sequence[int]]:
        """Greedy answer of every sample, without the token that ended it."""


class TorchSubject:
    """A PyTorch model as a subject; it computes in the precision of its weights.

    Args:
        loaded: The model.
        settings: How to decode; None decodes as the model's own generation_config.json says.
        name: Its name in messages, for example "the quantized model".

    Raises:
        ModelError: If it writes no text, or cannot be decoded as its generation_config.json says.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation
        >>> loaded, samples = load_float32("demo"), load_evaluation("demo")[:2]
        >>> subject = TorchSubject(loaded)
        >>> encoded = loaded.family.encode(loaded.processor, samples)
        >>> subject.logits(encoded).shape[:2] == encoded.input_ids.shape
        True
        >>> [loaded.processor.tokenizer.decode(ids) for ids in subject.generate_ids(encoded, max_new_tokens=8)]
        ['yes', 'rectangle']
    """

    def __init__(
        self, loaded: LoadedModel, settings: GenerationSettings | None = None, name: str = "the model"
    ) -> None:
        if not loaded.family.writes_text:
            compared = "actions: qe-edge validate" if loaded.family.acts else "features: qe_edge.validate.features"
            raise ModelError(
                f"A '{loaded.family.model_type}' model writes no text, so it has no answers to compare.",
                f"Compare its {compared}.",
            )
        self._loaded = loaded
        config, tokenizer = loaded.family.config, loaded.processor.tokenizer
        self.settings = settings_of(loaded.model, config, tokenizer) if settings is None else settings
        self._context: int = context_of(config)
        self._name = name

    def logits(self, encoded: Encoded) -> np.ndarray:
        """Logits float32 `[batch, sequence, vocabulary]`.

        Raises:
            InputError: If a sample is longer than the model's context.
        """
        self.check_length(encoded, 0)
        with torch.no_grad():
            output = self._loaded.model(**self._loaded.family.torch_inputs(encoded), use_cache=False)
        logits: Tensor = output.logits
        return logits.float().numpy()

    def generate_ids(self, encoded: Encoded, max_new_tokens: int) -> list[list[int]]:
        """Greedy answer of every sample, without the token that ended it.

        Raises:
            InputError: If prompt and answer are longer than the model's context.
            NumericalError: If logits are not finite.
        """
        self.check_length(encoded, max_new_tokens)
        if not max_new_tokens:
            return [[] for _ in encoded.input_ids]
        settings, prompt = self.settings, encoded.input_ids.shape[1]
        wanted = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(settings.eos_token_ids),
            pad_token_id=settings.pad_token_id,
        )
        inputs = self._loaded.family.torch_inputs(encoded)
        generate: Any = self._loaded.model.generate
        with torch.no_grad(), _without_own_settings(self._loaded.model):
            tokens: Tensor = generate(**inputs, generation_config=wanted, logits_processor=[self.rules(encoded)])
        return [_until_end(row, settings.eos_token_ids) for row in tokens[:, prompt:].tolist()]

    def check_length(self, encoded: Encoded, max_new_tokens: int) -> None:
        """Refuse a prompt that leaves too little of the context, before anything runs.

        Raises:
            InputError: If prompt and answer are longer than the model's context.
        """
        check_context(int(encoded.attention_mask.sum(1).max()), max_new_tokens, self._context)

    def rules(self, encoded: Encoded) -> Any:  # noqa: ANN401 - transformers takes any function
        """The settings as a processor of transformers, the same code as an engine's."""
        prompt = encoded.input_ids.shape[1]

        def adjust(tokens: Tensor, scores: Tensor) -> Tensor:
            logits = scores.numpy()
            check_finite(logits, f"The logits of {self._name}")
            new = tokens.shape[1] - prompt
            mask = np.pad(encoded.attention_mask, ((0, 0), (0, new)), constant_values=1)
            return torch.from_numpy(adjust_logits(self.settings, logits, tokens.numpy(), mask, new))

        return adjust


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:  # noqa: ANN401 - transformers' own class
    """Take the model's own generation settings away: transformers would fill missing values from them."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((index for index, token in enumerate(ids) if token in ends), len(ids))]


def block_groups(loaded: LoadedModel) -> dict[str, str]:
    """Group of every block by its dotted name.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> groups = block_groups(load_model("demo"))
        >>> groups["model.language_model.layers.0"], sorted(set(groups.values()))
        ('language', ['language', 'merger', 'visual'])
    """
    return {block.name: block.group for block in loaded.family.blocks(loaded.model)}


def load_float32(reference: str) -> LoadedModel:
    """Load a model in float32. It is read and converted block by block, so that only one block is in memory twice.

    Args:
        reference: "demo", a folder or a hub id.

    Raises:
        ModelError: If the model cannot be loaded.
        ResourceError: If it does not fit into memory.

    Example:
        >>> loaded = load_float32("demo")
        >>> {parameter.dtype for parameter in loaded.model.parameters()}
        {torch.float32}
    """
    loaded = load_outside_blocks(reference)
    check_free(4 * sum(parameter.numel() for parameter in loaded.model.parameters()))
    for block in loaded.family.blocks(loaded.model):
        loaded.stored.read(block.name, block.module)
        _convert(block.module, "", {})
    loaded.stored.read("", loaded.model)
    loaded.stored = StoredWeights()  # the files may hold another precision
    return in_float32(loaded)


def in_float32(loaded: LoadedModel, *, like: LoadedModel | None = None, decoded: bool = True) -> LoadedModel:
    """Convert a model in place to compute in float32; the tensors of quantized layers stay as they are stored.

    Args:
        loaded: The model.
        like: A model in float32 whose tensors are used where they are the same, so that they take no further memory.
        decoded: Whether quantized layers keep their float32 weights between calls: faster, and 4 bytes a weight.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo", torch.bfloat16)
        >>> in_float32(loaded).model.lm_head.weight.dtype
        torch.float32
    """
    known = {} if like is None else {**dict(like.model.named_parameters()), **dict(like.model.named_buffers())}
    _convert(loaded.model, "", known)
    for layer in quantized_linears(loaded.model).values():
        layer.keep_decoded(decoded)
    return loaded


def decode_layers(loaded: LoadedModel) -> None:
    """Decode the weights of all quantized layers once and for all.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.models.quantized import load_quantized  # doctest: +SKIP
        >>> loaded = load_quantized(Path("out/demo/checkpoint"))  # doctest: +SKIP
        >>> decode_layers(loaded)  # answers come faster from now on, for 4 bytes a weight  # doctest: +SKIP
    """
    for layer in quantized_linears(loaded.model).values():
        layer.keep_decoded(keep=True)
        layer.decoded_weight()
        trim_heap()  # without this, memory that decoding freed stays between the decoded weights


def _convert(module: nn.Module, prefix: str, known: Mapping[str, Tensor]) -> None:
    """Parameters and buffers in float32; one that equals its namesake in `known` becomes that. `prefix` is the path."""
    if isinstance(module, QELinear):
        return
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
            other = known.get(f"{prefix}{name}")
            if other is not None and torch.equal(other.data, tensor.data):
                tensor.data = other.data
    for name, child in module.named_children():
        _convert(child, f"{prefix}{name}.", known)
