"""PaliGemma and PaliGemma 2: SigLIP, one projection, Gemma or Gemma 2; all tokens of a prompt see each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.models.batching import Row, check_length, check_no_robot, left_pad, naming, prepare_pictures
from qe_edge.models.chat import answer_ids, text_ids
from qe_edge.models.export_limits import context_of, window_of
from qe_edge.models.family import TEXT, Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import SquareValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.samples import Turn
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.errors import InputError, ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import paligemma_graphs, tile_pictures
    from qe_edge.models.picture_graphs import PictureGraph
else:
    paligemma_graphs = lazy_module("qe_edge.models.paligemma_graphs")
    tile_pictures = lazy_module("qe_edge.models.tile_pictures")

ANSWER, PROMPT = 1, 2  # in the mask; 0 is padding, and tokens of an equal number above 1 see each other


class PaliGemma(ModelFamily):
    """Any `PaliGemmaForConditionalGeneration`, of 3B to 28B.

    A prompt is the tokens of its pictures, the first token of a text, the question and the end of a line. There is no
    chat template, and there are no turns.
    """

    model_type = "paligemma"
    picture_unit = "tiles"
    writes_prompts = True

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, the projector, decoder layers; found by class."""
        groups = {"SiglipEncoderLayer": "visual", "PaliGemmaMultiModalProjector": "merger"}
        return [
            Block(name, module, groups.get(type(module).__name__, "language"))
            for name, module in model.named_modules()
            if type(module).__name__ in groups or type(module).__name__.endswith("DecoderLayer")
        ]

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        if tokenizer.bos_token_id is None:
            raise ModelError(
                f"The tokenizer of '{folder}' names no bos_token, which PaliGemma's questions begin with.",
                "Copy tokenizer.json and tokenizer_config.json from the original model.",
            )
        image_processor = load_image_processor(folder, "siglip", SquareValues)
        size = [image_processor.size["height"], image_processor.size["width"]]
        check_equal(folder, "size", size, [self.config.vision_config.image_size] * 2)
        return VisionLanguageProcessor(tokenizer, image_processor)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch.

        Raises:
            InputError: Naming the sample, if it is running text or a conversation, has a picture that cannot be read,
                or is longer than the model's context.
        """
        pixels = prepare_pictures(processor.image_processor, samples)
        rows = []
        for sample in samples:
            with naming(sample):
                row = self._row(processor.tokenizer, sample, answers=answers)
                check_length(row, context_of(self.config), "A prompt")
                self._check_window(row)
            rows.append(row)
        return left_pad(rows, processor.tokenizer, self.config.image_token_id, pixels)

    def chat_text(self, processor: VisionLanguageProcessor, turns: Sequence[Turn]) -> str:
        """What `encode` tokenizes for one question, with one placeholder for each picture.

        Raises:
            InputError: If there are several turns.
        """
        if [turn.role for turn in turns] != ["user"]:
            raise InputError("A 'paligemma' model knows no conversation of several turns.", "Give one question.")
        tokenizer, (turn,) = processor.tokenizer, turns
        text, start = "", 0
        for mark in turn.marks:
            text += turn.text[start:mark] + tokenizer.convert_ids_to_tokens(self.config.image_token_id)
            start = mark
        return f"{text}{tokenizer.bos_token}{turn.text[start:]}\n"

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of `PaliGemmaForConditionalGeneration.forward`."""
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
            "token_type_ids": encoded.answer_mask.astype(np.int64),
            **encoded.pixels,
        }

    def position_ids(self, encoded: Encoded) -> np.ndarray:
        """Positions `[batch, sequence]`: valid tokens count from 1."""
        positions: np.ndarray = super().position_ids(encoded) + 1
        return positions

    def graph_mask(self, encoded: Encoded) -> np.ndarray:
        """0 on padding, 2 on the prompt, whose tokens see each other, and 1 on the answer."""
        mask: np.ndarray = np.where(encoded.answer_mask, ANSWER, PROMPT) * encoded.attention_mask
        return mask

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """`pixel_values` float32 `[pictures, 3, side, side]`."""
        return [{"pixel_values": encoded.pixels["pixel_values"].astype(np.float32, copy=False)}]

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """One tile and its tokens, in a prompt whose tokens all see each other."""
        image = self.config.image_token_id
        found = tile_pictures.single_tile(processor.image_processor, self._picture_ids(), image)
        window = window_of(self.config.text_config)
        return None if found is None else replace(found, whole=True, first_position=1, max_prompt=window)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over pictures, projection, decoder with positions `[batch, sequence]`."""
        return paligemma_graphs.graphs(model)

    def _picture_ids(self) -> list[int]:
        vision = self.config.vision_config
        return [self.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2

    def _check_window(self, row: Row) -> None:
        """Refuse a prompt beyond the window of Gemma 2, which graphs apply to prompts and transformers does not."""
        window = window_of(self.config.text_config)
        if window is not None and row.prompt_length > window:
            raise InputError(
                f"A prompt has {row.prompt_length} tokens; exported graphs of this model take {window}.",
                "Shorten the question, or use a model for smaller pictures.",
            )

    def _row(self, tokenizer: Any, sample: Sample, *, answers: bool) -> Row:  # noqa: ANN401 - tokenizers share no base
        """Tokens of a sample, as transformers' processor writes them."""
        if sample.kind == TEXT:
            raise InputError(
                "A 'paligemma' model reads questions, no running text: tokens of its prompts see what follows.",
                "Give lines with a picture and a question.",
            )
        check_no_robot(sample)
        if sample.earlier:
            raise InputError("A 'paligemma' model knows no conversation of several turns.", "Give one question.")
        picture = self._picture_ids()
        turn = sample.conversation[-1]
        ids: list[int] = []
        start = 0
        for mark in turn.marks:
            ids += text_ids(tokenizer, turn.text[start:mark], add_special_tokens=False) + picture
            start = mark
        ids.append(tokenizer.bos_token_id)
        ids += text_ids(tokenizer, f"{turn.text[start:]}\n", add_special_tokens=False)
        reply = answer_ids(tokenizer, sample) if answers else []
        return Row([*ids, *reply], len(ids))
