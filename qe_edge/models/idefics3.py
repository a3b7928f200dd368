"""Idefics3, SmolVLM and SmolVLM2: square tiles and an overview through SigLIP, pixel shuffle, one projection, Llama."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.models.batching import (
    Row,
    check_chat_template,
    check_length,
    encode_row,
    left_pad,
    naming,
    prepare_pictures,
)
from qe_edge.models.chat import filled_places
from qe_edge.models.chat_templates import take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import SplitValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.smolvlm_videos import PLACE, load_smol_videos, video_text, with_video_template
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.models.video_plans import take_times
from qe_edge.models.videos import Video
from qe_edge.system.errors import InputError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qe_edge.models import idefics3_graphs, idefics3_pictures
    from qe_edge.models.picture_graphs import PictureGraph
else:
    idefics3_graphs = lazy_module("qe_edge.models.idefics3_graphs")
    idefics3_pictures = lazy_module("qe_edge.models.idefics3_pictures")

AROUND, OVERVIEW = "<fake_token_around_image>", "<global-img>"  # what transformers' processor writes around tiles
CLASSES = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}  # how the classes of a model_type begin


@dataclass(frozen=True)
class Tiles:
    """An image processor that gives the tiles of one picture without the axes for other pictures."""

    image_processor: Any

    def __call__(self, **arguments: Any) -> dict[str, np.ndarray]:  # noqa: ANN401 - the processor's own
        """`pixel_values` `[tiles, 3, side, side]`, and `grid` `[1, 2]`: rows and columns, 0 where it is not cut."""
        found = self.image_processor(return_row_col_info=True, **arguments)
        grid = np.array([[found["rows"][0][0], found["cols"][0][0]]], np.int64)
        return {"pixel_values": np.asarray(found["pixel_values"])[0], "grid": grid}


class Idefics3(ModelFamily):
    """Any `Idefics3ForConditionalGeneration` or `SmolVLMForConditionalGeneration`, whatever its text model.

    A picture is cut into tiles, row by row, and an overview follows; every tile has the same number of tokens.
    """

    model_type = "idefics3"
    picture_unit = "tiles"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model_type = config.model_type  # type: ignore[misc] # one class for two types
        vision = self.config.vision_config
        self._tokens = (vision.image_size // vision.patch_size // self.config.scale_factor) ** 2

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, the connector, decoder layers; found by class, so the text model may be any."""
        prefix = CLASSES[self.model_type]
        groups = {f"{prefix}EncoderLayer": "visual", f"{prefix}Connector": "merger"}
        return [
            Block(name, module, groups.get(type(module).__name__, "language"))
            for name, module in model.named_modules()
            if type(module).__name__ in groups or type(module).__name__.endswith("DecoderLayer")
        ]

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, self.model_type, SplitValues)
        side = image_processor.max_image_size["longest_edge"]
        check_equal(folder, "max_image_size", side, self.config.vision_config.image_size)
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        videos = load_smol_videos(folder, self.config, self._tokens)
        return VisionLanguageProcessor(tokenizer, image_processor, videos)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; every tile has its place named and its tokens, as transformers' processor writes."""
        pixels = prepare_pictures(Tiles(processor.image_processor), samples, processor.video_processor)
        grids, frames, times = iter(pixels.pop("grid", ())), iter(pixels.pop("frames", ())), take_times(pixels)
        seconds, durations = iter(times["frame_seconds"].tolist()), iter(times["duration"].tolist())
        rows, counts = [], []
        context = context_of(self.config)
        image = self.config.image_token_id
        word = processor.tokenizer.convert_ids_to_tokens(image)
        for sample in samples:
            pictures: list[list[int]] = []
            films: list[str] = []
            counts.append(0)
            for shown in sample.media:
                if isinstance(shown, Video):
                    taken = list(itertools.islice(seconds, count := int(next(frames))))
                    pictures += [[image] * self._tokens] * count
                    films.append(video_text(taken, next(durations), f"{AROUND}{OVERVIEW}{word}{AROUND}"))
                else:
                    height, width = map(int, next(grids))
                    count = height * width + 1
                    pictures.append(self._tile_ids(processor.tokenizer, height, width))
                counts[-1] += count
            with naming(sample):
                row = self._row(processor.tokenizer, sample, pictures, films, answer=answers)
                check_length(row, context, "A prompt")
            rows.append(row)
        if pixels:
            pixels["tiles"] = np.array(counts, np.int64)
        return left_pad(rows, processor.tokenizer, image, pixels)

    def _row(
        self,
        tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
        sample: Sample,
        pictures: Sequence[list[int]],
        films: Sequence[str],
        *,
        answer: bool,
    ) -> Row:
        image = self.config.image_token_id
        if not films:
            return encode_row(tokenizer, sample, image, pictures, answer=answer)
        if any(PLACE in turn.text for turn in sample.conversation):
            raise InputError(f"A text spells {PLACE}, which stands for a video here.", "Leave it out.")
        return encode_row(
            with_video_template(tokenizer),
            sample,
            image,
            pictures,
            answer=answer,
            rewrite=lambda prompt: filled_places(prompt, PLACE, films),
        )

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward, which takes as many tiles for every row; those of zeros are none."""
        arrays = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
        }
        if encoded.pixels:
            pixels, counts = encoded.pixels["pixel_values"], encoded.pixels["tiles"]
            padded = np.zeros((len(counts), counts.max(), *pixels.shape[1:]), pixels.dtype)
            padded[np.arange(counts.max()) < counts[:, None]] = pixels
            arrays["pixel_values"] = padded
        return arrays

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """`pixel_values` float32 `[tiles, 3, side, side]`."""
        return [{"pixel_values": encoded.pixels["pixel_values"].astype(np.float32, copy=False)}]

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """Tiles, an overview, and their tokens with their places."""

        def tile_ids(rows: int, columns: int) -> list[int]:
            return self._tile_ids(processor.tokenizer, rows, columns)

        image = self.config.image_token_id
        return idefics3_pictures.picture_graph(processor.image_processor, tile_ids, image, self._tokens)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over tiles, pixel shuffle with projection, decoder with positions `[batch, sequence]`."""
        return idefics3_graphs.graphs(model, CLASSES[self.model_type])

    def _tile_ids(self, tokenizer: Any, rows: int, columns: int) -> list[int]:  # noqa: ANN401 - share no typed base
        """Tokens of a picture: its tiles and where they stand, line by line, then the overview."""
        image = tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        lines = [
            "".join(f"{AROUND}<row_{row + 1}_col_{column + 1}>{image * self._tokens}" for column in range(columns))
            for row in range(rows)
        ]
        text = "".join(f"{line}\n" for line in lines) + ("\n" if lines else "")
        ids: list[int] = tokenizer(
            f"{text}{AROUND}{OVERVIEW}{image * self._tokens}{AROUND}", add_special_tokens=False, verbose=False
        )["input_ids"]
        return ids
