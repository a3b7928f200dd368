"""Gemma 4: pictures of any shape, layers that share keys and values, and a second embedding for every layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.models.batching import (
    check_chat_template,
    check_length,
    encode_row,
    left_pad,
    naming,
    prepare_pictures,
)
from qe_edge.models.chat_templates import take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.gemma3 import numbered_pictures
from qe_edge.models.image_processors import SoftTokenValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.qwen_vl import in_groups
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.errors import ModelError, QENotice
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qe_edge.models import gemma4_graphs, gemma4_pictures
    from qe_edge.models.picture_graphs import PictureGraph
else:
    gemma4_graphs = lazy_module("qe_edge.models.gemma4_graphs")
    gemma4_pictures = lazy_module("qe_edge.models.gemma4_pictures")

PADDING = -1  # position of what fills up a picture's patches
REMEDY = "Choose a Gemma 4 model without experts, as E2B, E4B or 31B."


class Gemma4(ModelFamily):
    """Any `Gemma4ForConditionalGeneration` without experts: E2B, E4B, 31B.

    A picture is scaled to at most `max_soft_tokens` tokens, each of `pooling_kernel_size` x `pooling_kernel_size`
    patches. Audio is left out: no sample can name any, and the audio encoder stays in the checkpoint as it is.
    """

    model_type = "gemma4"
    picture_unit = "patches"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        if text.enable_moe_block:
            raise ModelError("Gemma 4 with experts cannot be quantized: its experts are no linear layers.", REMEDY)
        if config.vision_config is None:
            raise ModelError("This Gemma 4 has no vision encoder.", "Get config.json of the original model again.")
        if text.use_bidirectional_attention == "all":
            raise ModelError("This Gemma 4 lets a token see later ones, and so writes no text.", REMEDY)
        if text.hidden_size_per_layer_input and text.vocab_size_per_layer_input < text.vocab_size:
            raise ModelError(
                f"vocab_size_per_layer_input {text.vocab_size_per_layer_input} is below vocab_size {text.vocab_size}.",
                "Get config.json of the original model again.",
            )

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, the projection, decoder layers; found by class."""
        groups = {"Gemma4VisionEncoderLayer": "visual", "Gemma4TextDecoderLayer": "language"}
        found = [
            Block(name, module, groups[type(module).__name__])
            for name, module in model.named_modules()
            if type(module).__name__ in groups
        ]
        merger = gemma4_graphs.embedder_of(model)
        name = next(name for name, module in model.named_modules() if module is merger)
        order = {"visual": 0, "merger": 1, "language": 2}
        return sorted([*found, Block(name, merger, "merger")], key=lambda block: order[block.group])

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "gemma4", SoftTokenValues)
        vision = self.config.vision_config
        check_equal(folder, "patch_size", image_processor.patch_size, vision.patch_size)
        check_equal(folder, "pooling_kernel_size", image_processor.pooling_kernel_size, vision.pooling_kernel_size)
        longest = image_processor.max_soft_tokens * vision.pooling_kernel_size
        if longest > vision.position_embedding_size:
            raise ModelError(
                f"A picture of '{folder}' may be {longest} patches long, and the vision encoder has "
                f"{vision.position_embedding_size} positions.",
                "Copy preprocessor_config.json and config.json from the same model.",
            )
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        return VisionLanguageProcessor(tokenizer, image_processor)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; a picture's tokens stand between its marks."""
        pixels = prepare_pictures(processor.image_processor, samples)
        counts = iter(pixels.pop("num_soft_tokens_per_image", np.zeros(0, np.int64)).tolist())
        rows = []
        for sample in samples:
            pictures = [self._picture_ids(next(counts)) for _ in sample.pictures]
            with naming(sample):
                row = encode_row(processor.tokenizer, sample, self.config.image_token_id, pictures, answer=answers)
                check_length(row, context_of(self.config), "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, self.config.image_token_id, pixels)

    def _picture_ids(self, count: int) -> list[int]:
        config = self.config
        return [config.boi_token_id, *[config.image_token_id] * count, config.eoi_token_id]

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of `Gemma4ForConditionalGeneration.forward`."""
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
            "mm_token_type_ids": encoded.image_mask.astype(np.int64),
            **encoded.pixels,
        }

    def graph_mask(self, encoded: Encoded) -> np.ndarray:
        """0 on padding, 1 on text; pictures are numbered from 2 where their tokens see each other."""
        if self.config.text_config.use_bidirectional_attention != "vision":
            return encoded.attention_mask
        return numbered_pictures(encoded)

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Patches of every picture, in groups of the ones that become one token, without padding.

        `pixel_values` float32 `[groups, patches, values]`; `position_ids` int64 `[groups, patches, 2]`, column and row.
        """
        if not encoded.pixels:
            return []
        side = self.config.vision_config.pooling_kernel_size
        feeds = []
        for values, places in zip(encoded.pixels["pixel_values"], encoded.pixels["image_position_ids"], strict=True):
            valid = (places != PADDING).any(-1)
            columns, rows = (int(size) + 1 for size in places[valid].max(0))
            feeds.append(
                {
                    name: in_groups(array[valid].reshape(rows, columns, -1).transpose(2, 0, 1), side)
                    for name, array in (
                        ("pixel_values", values.astype(np.float32, copy=False)),
                        ("position_ids", places.astype(np.int64, copy=False)),
                    )
                }
            )
        return feeds

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """Scaling, patches, positions, and the tokens between the picture's marks."""
        config = self.config
        return gemma4_pictures.picture_graph(
            processor.image_processor,
            (config.boi_token_id, config.image_token_id, config.eoi_token_id),
            numbered=config.text_config.use_bidirectional_attention == "vision",
        )

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder with its pooling over patches, projection, decoder with positions `[batch, sequence]`."""
        if self.config.audio_config is not None:
            warnings.warn(
                "The audio encoder of this model is left out: graphs read texts and pictures.", QENotice, stacklevel=2
            )
        return gemma4_graphs.graphs(model)
