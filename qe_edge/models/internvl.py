"""InternVL 2.5 and 3 (the "-hf" layout): square tiles through a ViT, pixel shuffle, projector, Qwen2 or Llama."""

from __future__ import annotations

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
from qe_edge.models.chat import Rewrite, as_it_is, filled_places
from qe_edge.models.chat_templates import take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import TileValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.tile_videos import TileVideos
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.models.video_plans import take_times
from qe_edge.models.video_values import TileVideoValues, load_video_values
from qe_edge.models.videos import Video
from qe_edge.system.errors import ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qe_edge.models import internvl_graphs, tile_pictures
    from qe_edge.models.picture_graphs import PictureGraph
else:
    internvl_graphs = lazy_module("qe_edge.models.internvl_graphs")
    tile_pictures = lazy_module("qe_edge.models.tile_pictures")


class InternVL(ModelFamily):
    """Any `InternVLForConditionalGeneration` of transformers, whatever its text model.

    A picture becomes one square tile, or several and a thumbnail, as its image processor's `max_patches` says; every
    tile has `image_seq_length` tokens.

    Raises:
        ModelError: If the projector reads anything but the patches of the vision encoder's last layer.
    """

    model_type = "internvl"
    picture_unit = "tiles"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        if config.vision_feature_layer != -1:
            raise ModelError(
                f"This model reads vision layer {config.vision_feature_layer}; QE-Edge supports the last layer only.",
                "Use a model whose config.json has vision_feature_layer -1, as all released ones do.",
            )
        if config.vision_feature_select_strategy != "default":
            raise ModelError(
                f"This model selects vision features by '{config.vision_feature_select_strategy}'.",
                "Use a model whose config.json has vision_feature_select_strategy 'default'.",
            )

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, the projector, decoder layers; found by class, so the text model may be any."""
        groups = {"InternVLVisionLayer": "visual", "InternVLMultiModalProjector": "merger"}
        return [
            Block(name, module, groups.get(type(module).__name__, "language"))
            for name, module in model.named_modules()
            if type(module).__name__ in groups or type(module).__name__.endswith("DecoderLayer")
        ]

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "got_ocr2", TileValues)
        tile = [image_processor.size["height"], image_processor.size["width"]]
        check_equal(folder, "size", tile, list(self.config.vision_config.image_size))
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        return VisionLanguageProcessor(tokenizer, image_processor, self._videos(tokenizer, folder))

    def _videos(self, tokenizer: Any, folder: str) -> TileVideos | None:  # noqa: ANN401 - tokenizers share no base
        """What prepares videos, if the folder has settings for the vision encoder's size and a token for videos."""
        values = load_video_values(folder, TileVideoValues, TileVideos.defaults)
        tile = None if values is None else [values.size.height, values.size.width]
        if values is None or tile != list(self.config.vision_config.image_size) or not _video_token(tokenizer):
            return None
        frame = len(_between_marks(tokenizer, [self.config.image_token_id] * self.config.image_seq_length))
        return TileVideos(values, frame, context_of(self.config))

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; the image token is repeated `image_seq_length` times per tile or frame."""
        # transformers' own processor always tiles, whatever crop_to_patches says in the file; max_patches 1 prevents it
        pixels = prepare_pictures(processor.image_processor, samples, processor.video_processor, crop_to_patches=True)
        tiles = iter(pixels.pop("num_patches", ()))
        take_times(pixels)
        image, length = self.config.image_token_id, self.config.image_seq_length
        rows = []
        context = context_of(self.config)
        for sample in samples:
            counts, frames = [], []
            for shown in sample.media:
                if isinstance(shown, Video):  # frames have an image token each in the prompt
                    frames.append(int(next(tiles)))
                    counts += [length] * frames[-1]
                else:
                    counts.append(int(next(tiles)) * length)
            pictures = [_between_marks(processor.tokenizer, [image] * count) for count in counts]
            with naming(sample):
                row = encode_row(
                    processor.tokenizer,
                    sample,
                    image,
                    pictures,
                    answer=answers,
                    rewrite=self._with_frames(processor.tokenizer, frames) if frames else as_it_is,
                )
                check_length(row, context, "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels)

    def _with_frames(self, tokenizer: Any, frames: Sequence[int]) -> Rewrite:  # noqa: ANN401 - as above
        """Put a line for every frame in a video's place, with the token of a picture; `frames` are their numbers."""
        picture, video = tokenizer.convert_ids_to_tokens(self.config.image_token_id), _video_token(tokenizer)
        lines = ["\n".join(f"Frame{number + 1}: {picture}" for number in range(count)) for count in frames]
        return lambda prompt: filled_places(prompt, video, lines)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of `InternVLForConditionalGeneration.forward`."""
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            **encoded.pixels,
            # forward alone would count padding too, generate would not; given, both agree with the exported graph
            "position_ids": self.position_ids(encoded),
        }

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """`pixel_values` float32 `[tiles, 3, height, width]`."""
        return [{"pixel_values": encoded.pixels["pixel_values"].astype(np.float32, copy=False)}]

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """Tiles, and the tokens between the tokenizer's marks."""
        image = self.config.image_token_id
        marks = _between_marks(processor.tokenizer, [image])
        before = marks[: marks.index(image)]
        between = (before, image, marks[len(before) + 1 :])
        return tile_pictures.best_grid(processor.image_processor, between, self.config.image_seq_length, image)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over tiles, pixel shuffle with projector, decoder with positions `[batch, sequence]`."""
        return internvl_graphs.graphs(model)


def _between_marks(tokenizer: Any, tokens: list[int]) -> list[int]:  # noqa: ANN401 - tokenizers share no typed base
    """A picture's tokens between the tokenizer's marks for start and end of a picture, where it has such marks."""
    start, end = (getattr(tokenizer, f"{side}_image_token_id", None) for side in ("start", "end"))
    return tokens if not tokens or start is None or end is None else [start, *tokens, end]


def _video_token(tokenizer: Any) -> str:  # noqa: ANN401 - as above
    """What the chat template writes for a video; empty where the tokenizer has no such token."""
    return str(getattr(tokenizer, "video_token", None) or "")
