"""Decoder-only language models: text in, text out, no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.models.batching import Row, check_length, encode_text, left_pad, naming
from qe_edge.models.chat import answer_ids, chat_ids, earlier_answers, render_turns
from qe_edge.models.chat_templates import check_template, take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import TEXT, Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.samples import Turn
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.errors import InputError, ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qe_edge.models import decoder, softcap
else:
    decoder = lazy_module("qe_edge.models.decoder")
    softcap = lazy_module("qe_edge.models.softcap")

NO_IMAGE_TOKEN = -1  # equals no token


@dataclass(frozen=True)
class TextProcessor:
    """A tokenizer alone."""

    tokenizer: Any


class CausalLM(ModelFamily):
    """Any language model of transformers that takes embeddings and a mask, and gives back keys and values.

    Samples of kind "text" are running text, tokenized as they are; all others are put into the tokenizer's chat
    template, or taken as they are where it has none.
    """

    model_type = "llama"
    auto_class = "AutoModelForCausalLM"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model_type = config.model_type  # type: ignore[misc] # one class for several types

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Decoder layers."""
        return [
            Block(name, module, "language")
            for name, module in model.named_modules()
            if type(module).__name__.endswith("DecoderLayer")
        ]

    def load_processor(self, folder: str) -> TextProcessor:
        """Tokenizer of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.vocab_size)
        take_processor_template(tokenizer, folder)
        if tokenizer.chat_template is not None:
            check_template(tokenizer, folder, "?")
        return TextProcessor(tokenizer)

    def save_processor(self, processor: TextProcessor, folder: Path) -> None:
        """Write the tokenizer beside a checkpoint."""
        processor.tokenizer.save_pretrained(folder)

    def encode(self, processor: TextProcessor, samples: Sequence[Sample], *, answers: bool = False) -> Encoded:
        """One left-padded batch of texts or chat prompts.

        Raises:
            InputError: Naming the sample, if it has a picture, or is longer than the model's context.
        """
        rows = []
        for sample in samples:
            with naming(sample):
                row = self._row(processor.tokenizer, sample, answers=answers)
                check_length(row, context_of(self.config), "A text")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, NO_IMAGE_TOKEN, {})

    def chat_text(self, processor: TextProcessor, turns: Sequence[Turn]) -> str:
        """What `encode` tokenizes for a conversation."""
        return render_turns(processor.tokenizer, turns, as_parts=False)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward."""
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            # forward alone would count padding too, generate would not
            "position_ids": self.position_ids(encoded),
        }

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:  # noqa: ARG002 - a family's interface
        """There is no visual encoder.

        Raises:
            ModelError: Always.
        """
        raise ModelError(f"A '{self.model_type}' model has no visual encoder.", "Leave the pictures out.")

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """The language model alone, with its KV cache."""
        return [decoder.decoder_graph(decoder.Decoder(model.get_decoder(), softcap.head_of(model)))]

    def _row(self, tokenizer: Any, sample: Sample, *, answers: bool) -> Row:  # noqa: ANN401 - tokenizers share no base
        if sample.image is not None:
            raise InputError(
                f"A '{self.model_type}' model reads no {'videos' if sample.videos else 'pictures'}.",
                'Give lines of {"text": ...}, or questions without an image.',
            )
        spoken: list[int] = []
        if sample.kind == TEXT or tokenizer.chat_template is None:
            if sample.earlier:
                raise InputError(
                    "This model has no chat template for a conversation of several turns.",
                    "Give one question, or copy chat_template.jinja from a model that was trained to chat.",
                )
            ids = encode_text(tokenizer, sample.question)
        else:
            ids = chat_ids(tokenizer, sample.conversation, as_parts=False)
            spoken = earlier_answers(tokenizer, sample.conversation, ids, as_parts=False) if answers else []
        reply = answer_ids(tokenizer, sample) if answers else []
        return Row([*ids, *reply], len(ids), tuple(spoken))
