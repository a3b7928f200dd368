"""MiniCPM-V 4.6: pictures of any size, large ones in slices, a SigLIP that joins patches midway, and Qwen3.5's text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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
from qe_edge.models.image_processors import SliceValues, check_equal, load_image_processor
from qe_edge.models.minicpmv4_6_slices import MARKS, NAMES, Slices, image_feeds, slices_text
from qe_edge.models.minicpmv4_6_videos import SliceVideos, SliceVideoValues
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.qwen3_5 import SIBLINGS
from qe_edge.models.tokenizers import REMEDY, load_tokenizer
from qe_edge.models.video_plans import take_times
from qe_edge.models.video_values import FILE, load_video_values
from qe_edge.system.errors import ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import minicpmv4_6_graphs, minicpmv4_6_pictures, minicpmv4_6_tokens
    from qe_edge.models.picture_graphs import PictureGraph
else:
    minicpmv4_6_graphs = lazy_module("qe_edge.models.minicpmv4_6_graphs")
    minicpmv4_6_pictures = lazy_module("qe_edge.models.minicpmv4_6_pictures")
    minicpmv4_6_tokens = lazy_module("qe_edge.models.minicpmv4_6_tokens")

LAYER, WINDOWS, MERGER = (
    f"MiniCPMV4_6{name}" for name in ("VisionEncoderLayer", "ViTWindowAttentionMerger", "DownsampleMLP")
)


class MiniCPMV46(ModelFamily):
    """Any `MiniCPMV4_6ForConditionalGeneration`, whatever its text model.

    Example:
        >>> from transformers import MiniCPMV4_6Config
        >>> MiniCPMV46(MiniCPMV4_6Config()).joined  # patches of a token: windows of four, merged by four
        (4, 4)
        >>> MiniCPMV46(MiniCPMV4_6Config(downsample_mode="4x")).joined
        (4,)
    """

    model_type = "minicpmv4_6"
    picture_unit = "tiles"
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = SIBLINGS

    @property
    def joined(self) -> tuple[int, ...]:
        """How many neighbours become one, step by step: in the vision encoder, if it joins any, and in the merger."""
        return (4,) if self.config.downsample_mode == "4x" else (4, 4)

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, among them what joins patches, if it is used; the merger, decoder layers."""
        modules = [(type(module).__name__, name, module) for name, module in model.named_modules()]
        visual, windows, merger = (
            [Block(name, module, group) for kind, name, module in modules if kind == wanted]
            for wanted, group in ((LAYER, "visual"), (WINDOWS, "visual"), (MERGER, "merger"))
        )
        after = self.config.vision_config.insert_layer_id + 1
        visual[after:after] = windows if len(self.joined) > 1 else []
        language = [Block(name, module, "language") for kind, name, module in modules if kind.endswith("DecoderLayer")]
        return [*visual, *merger, *language]

    def adapt(self, model: PreTrainedModel) -> None:
        """One call of every layer for all images; transformers calls some for each, or for videos once more."""
        minicpmv4_6_graphs.see_at_once(model)

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "minicpmv4_6", SliceValues)
        check_equal(folder, "patch_size", image_processor.patch_size, self.config.vision_config.patch_size)
        check_equal(folder, "downsample_mode", image_processor.downsample_mode, self.config.downsample_mode)
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        for name in MARKS:
            mark = getattr(tokenizer, f"{name}_token", None)
            if mark not in tokenizer.get_added_vocab():
                raise ModelError(f"The tokenizer of '{folder}' has no {name}_token, which stands at a picture.", REMEDY)
        return VisionLanguageProcessor(tokenizer, image_processor, self._videos(folder, tokenizer, image_processor))

    def _videos(self, folder: str, tokenizer: Any, image_processor: Any) -> SliceVideos | None:  # noqa: ANN401
        """What prepares videos, if the folder has settings and the tokenizer the model's token for them."""
        values = load_video_values(folder, SliceVideoValues, SliceVideos.defaults)
        video = self.config.video_token_id
        if values is None or video is None or getattr(tokenizer, "video_token_id", None) != video:
            return None
        check_equal(folder, "patch_size", values.patch_size, self.config.vision_config.patch_size, FILE)
        check_equal(folder, "downsample_mode", values.downsample_mode, self.config.downsample_mode, FILE)
        return SliceVideos(values, image_processor, context_of(self.config))

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; before a picture stands its number, and its slices follow, as transformers writes."""
        pixels = prepare_pictures(Slices(processor.image_processor), samples, processor.video_processor)
        take_times(pixels)
        cut, frames = iter(pixels.pop("slices", ())), iter(pixels.pop("unit_grids", ()))
        units, counts, film_counts = iter(pixels.pop("units", ())), *map(iter, self._counts(pixels))
        image, video, rows = self.config.image_token_id, self.config.video_token_id, []
        numbered, context = processor.image_processor.use_image_id, context_of(self.config)
        for sample in samples:
            pictures = [[next(cut)] for _ in sample.pictures]
            films = [[next(frames) for _ in range(int(next(units)))] for _ in sample.videos]
            with naming(sample):
                row = encode_row(
                    processor.tokenizer,
                    sample,
                    image,
                    self._ids(processor.tokenizer, image, pictures, counts, numbered=numbered),
                    answer=answers,
                    video_token=video,
                    videos=self._ids(processor.tokenizer, video, films, film_counts, numbered=numbered),
                )
                check_length(row, context, "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels, video)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward; `pixel_values` is one row of patches, `[1, 3, side, patches * side]`."""
        arrays = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
        }
        side = self.config.vision_config.patch_size
        for name, sizes in NAMES:
            if name in encoded.pixels:
                patches = encoded.pixels[name].reshape(-1, 3, side, side)
                arrays[name] = patches.transpose(1, 2, 0, 3).reshape(1, 3, side, -1)
                arrays[sizes] = encoded.pixels[sizes]
        return arrays

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Images of one size that follow each other, which attend to nothing outside of themselves.

        `pixel_values` float32 `[images, patches, values]`, patches of a token together, and of them those of a window;
        `places` float32 `[1, patches, 2]`: where a patch begins, as shares of the image's height and width.
        """
        films = encoded.input_ids[encoded.image_mask] == self.config.video_token_id
        return image_feeds(encoded.pixels, films, self.joined)

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """The whole picture, its slices, and their tokens; a picture's number stands before them."""
        settings = processor.image_processor
        tokens = minicpmv4_6_tokens.tokens_of(processor.tokenizer, self.config.image_token_id, settings)
        return minicpmv4_6_pictures.picture_graph(settings, tokens, len(self.joined))

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over images of one size, merger over tokens, decoder with positions `[batch, sequence]`."""
        return minicpmv4_6_graphs.graphs(model, windows=len(self.joined) > 1)

    def _counts(self, pixels: dict[str, np.ndarray]) -> list[list[int]]:
        """Features of every image of pictures, and of videos."""
        none = np.zeros((0, 2), np.int64)
        return [(pixels.get(sizes, none).prod(1) // math.prod(self.joined)).tolist() for _, sizes in NAMES]

    def _ids(
        self,
        tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
        token: int,
        shown: Sequence[Sequence[np.ndarray]],
        counts: Iterator[int],
        *,
        numbered: bool,
    ) -> list[list[int]]:
        """Tokens of pictures or videos, given by rows and columns of slices of all that they show."""
        word, found = tokenizer.convert_ids_to_tokens(token), []
        id_start, id_end = (getattr(tokenizer, f"{name}_token") for name in MARKS[:2])
        for number, grids in enumerate(shown):
            text = f"{id_start}{number}{id_end}" if numbered else ""
            for grid in grids:
                own = list(itertools.islice(counts, 1 + int(grid.prod())))
                text += slices_text(tokenizer, word, own, int(grid[1]))
            found.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return found
