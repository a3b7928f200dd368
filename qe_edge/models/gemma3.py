"""Gemma 3 with pictures: SigLIP, average pooling and a projection; the tokens of a picture see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from qe_edge.models.batching import (
    check_chat_template,
    check_length,
    encode_row,
    left_pad,
    naming,
    prepare_pictures,
)
from qe_edge.models.chat import Rewrite
from qe_edge.models.chat_templates import take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import SquareValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.samples import Turn
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import gemma3_graphs, tile_pictures
    from qe_edge.models.picture_graphs import PictureGraph
else:
    gemma3_graphs = lazy_module("qe_edge.models.gemma3_graphs")
    tile_pictures = lazy_module("qe_edge.models.tile_pictures")

FIRST_PICTURE = 2  # in the mask: 0 is padding, 1 text


class Gemma3(ModelFamily):
    """Any `Gemma3ForConditionalGeneration`: 4B, 12B and 27B, MedGemma.

    A picture is scaled to one size and becomes `mm_tokens_per_image` tokens. Pan-and-scan, which is off in released
    models, stays off. The projection is a bare matrix in transformers, so there is no merger to quantize.
    """

    model_type = "gemma3"
    picture_unit = "tiles"

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers and decoder layers; found by class."""
        groups = {"SiglipEncoderLayer": "visual", "Gemma3DecoderLayer": "language"}
        found = [
            Block(name, module, groups[type(module).__name__])
            for name, module in model.named_modules()
            if type(module).__name__ in groups
        ]
        return sorted(found, key=lambda block: block.group != "visual")

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "gemma3", SquareValues)
        size = [image_processor.size["height"], image_processor.size["width"]]
        check_equal(folder, "size", size, [self.config.vision_config.image_size] * 2)
        check_chat_template(tokenizer, folder, self.config.boi_token_index)
        return VisionLanguageProcessor(tokenizer, image_processor)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; a picture's tokens stand between its marks, with blank lines around, as Gemma's do."""
        pixels = prepare_pictures(processor.image_processor, samples, do_pan_and_scan=False)
        pixels.pop("num_crops", None)
        config, tokenizer = self.config, processor.tokenizer
        start = config.boi_token_index
        picture = self._picture_ids()
        rows = []
        for sample in samples:
            with naming(sample):
                row = encode_row(
                    tokenizer,
                    sample,
                    start,
                    [picture] * len(sample.pictures),
                    answer=answers,
                    rewrite=self._with_blank_lines(processor),
                )
                check_length(row, context_of(config), "A prompt")
            rows.append(row)
        return left_pad(rows, tokenizer, config.image_token_id, pixels)

    def chat_text(self, processor: VisionLanguageProcessor, turns: Sequence[Turn]) -> str:
        """What `encode` tokenizes for a conversation."""
        return self._with_blank_lines(processor)(super().chat_text(processor, turns))

    def _picture_ids(self) -> list[int]:
        config = self.config
        features = [config.image_token_id] * config.mm_tokens_per_image
        return [config.boi_token_index, *features, config.eoi_token_index]

    def _with_blank_lines(self, processor: VisionLanguageProcessor) -> Rewrite:
        mark = processor.tokenizer.convert_ids_to_tokens(self.config.boi_token_index)
        return lambda prompt: prompt.replace(mark, f"\n\n{mark}\n\n")

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of `Gemma3ForConditionalGeneration.forward`."""
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
            "token_type_ids": encoded.image_mask.astype(np.int64),
            **encoded.pixels,
        }

    def graph_mask(self, encoded: Encoded) -> np.ndarray:
        """0 on padding, 1 on text, and a number of its own, from 2, on every picture: its tokens see each other."""
        return numbered_pictures(encoded)

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """`pixel_values` float32 `[pictures, 3, side, side]`."""
        return [{"pixel_values": encoded.pixels["pixel_values"].astype(np.float32, copy=False)}]

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """One tile, and the tokens between Gemma's marks."""
        found = tile_pictures.single_tile(processor.image_processor, self._picture_ids(), self.config.boi_token_index)
        return None if found is None else replace(found, numbered=True)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over pictures, pooling with projection, decoder with positions `[batch, sequence]`."""
        return gemma3_graphs.graphs(model)


def numbered_pictures(encoded: Encoded) -> np.ndarray:
    """`attention_mask` int64 `[batch, sequence]` with a number from 2 on every picture's tokens, 1 on text.

    Example:
        >>> image = np.array([[False, True, True, False, True]])
        >>> numbered_pictures(Encoded(image, np.ones_like(image, np.int64), image, image)).tolist()
        [[1, 2, 2, 1, 3]]
    """
    image = encoded.image_mask
    first = image & ~np.pad(image, ((0, 0), (1, 0)))[:, :-1]
    number = np.cumsum(first, axis=1) - 1 + FIRST_PICTURE
    numbered: np.ndarray = np.where(image, number, encoded.attention_mask)
    return numbered
