"""LLaVA-OneVision: an overview and tiles of any resolution through SigLIP, two projections, Qwen2."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from qe_edge.models.anyres import Tokens, tokens_of_frame, tokens_of_picture, tokens_of_tile
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
from qe_edge.models.image_processors import ResolutionValues, check_equal, load_image_processor
from qe_edge.models.llava_onevision_videos import Seen, load_frame_videos, seen_frames, seen_in_order
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.models.video_plans import take_times
from qe_edge.system.errors import ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from qe_edge.models import llava_onevision_graphs, llava_onevision_pictures
    from qe_edge.models.picture_graphs import PictureGraph
else:
    llava_onevision_graphs = lazy_module("qe_edge.models.llava_onevision_graphs")
    llava_onevision_pictures = lazy_module("qe_edge.models.llava_onevision_pictures")

LIMIT = "anyres_max_"  # how the setting begins that says when a picture is scaled down


@dataclass(frozen=True)
class Tiles:
    """An image processor that is told of every picture whether it is the only one of its sample."""

    image_processor: Any
    alone: Iterator[bool]

    def __call__(self, images: list[Image.Image], **options: Any) -> dict[str, np.ndarray]:  # noqa: ANN401
        """Of one picture `pixel_values` `[tiles, 3, side, side]`, `tiles` `[1]` and `image_sizes` `[1, 2]`."""
        # transformers does not tile a picture with others beside it; the smallest other costs nothing
        group = images if next(self.alone) else [[*images, Image.new("RGB", (1, 1))]]
        found = self.image_processor(images=group, **options)
        pixels = np.asarray(found["pixel_values"])[0]
        return {
            "pixel_values": pixels,
            "tiles": np.array([len(pixels)], np.int64),
            "image_sizes": np.asarray(found["image_sizes"], np.int64)[:1],
        }


class LlavaOnevision(ModelFamily):
    """Any `LlavaOnevisionForConditionalGeneration` with a SigLIP encoder, whatever its text model.

    The picture of a question that has one is scaled to one of several resolutions, cut into tiles, and an overview
    stands before them. Each of several pictures is one tile. So is each frame of a video, with a quarter of the tokens.

    Raises:
        ModelError: If the projector reads anything but the patches of the vision encoder's last layer.
    """

    model_type = "llava_onevision"
    picture_unit = "tiles"
    pictures_stand_alone = False  # beside others a picture is not cut into tiles

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        chosen = (config.vision_feature_layer, config.vision_feature_select_strategy, config.vision_config.model_type)
        if chosen != (-1, "full", "siglip_vision_model"):
            raise ModelError(
                f"This model reads layer {chosen[0]} ('{chosen[1]}') of a '{chosen[2]}' encoder; QE-Edge supports the "
                f"last layer ('full') of a 'siglip_vision_model'.",
                "Use a model whose config.json says so, as all released ones do.",
            )
        self._side = config.vision_config.image_size // config.vision_config.patch_size
        self._most = int(config.vision_aspect_ratio.removeprefix(LIMIT))

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, the projector, decoder layers; found by class, so the text model may be any."""
        groups = {"SiglipEncoderLayer": "visual", "LlavaOnevisionMultiModalProjector": "merger"}
        return [
            Block(name, module, groups.get(type(module).__name__, "language"))
            for name, module in model.named_modules()
            if type(module).__name__ in groups or type(module).__name__.endswith("DecoderLayer")
        ]

    def adapt(self, model: PreTrainedModel) -> None:
        """One call of the vision encoder for pictures and videos; transformers has one for each."""
        llava_onevision_graphs.see_at_once(model)

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "llava_onevision", ResolutionValues)
        size = [image_processor.size["height"], image_processor.size["width"]]
        check_equal(folder, "size", size, [self.config.vision_config.image_size] * 2)
        resolutions = [list(found) for found in image_processor.image_grid_pinpoints]
        check_equal(folder, "image_grid_pinpoints", resolutions, [list(r) for r in self.config.image_grid_pinpoints])
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        videos = load_frame_videos(folder, self.config, len(tokens_of_frame(self._side).places))
        return VisionLanguageProcessor(tokenizer, image_processor, videos)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; the token of each picture and video is repeated as often as it has tokens."""
        alone = [len(sample.pictures) == 1 for sample in samples for _ in sample.pictures]
        pixels = prepare_pictures(Tiles(processor.image_processor, iter(alone)), samples, processor.video_processor)
        take_times(pixels)
        if "pixel_values" in pixels:
            pixels["batch_num_images"] = np.array([len(sample.pictures) for sample in samples], np.int64)
        lengths = iter([len(tokens.places) for tokens in self._tokens(pixels)])
        frame = len(tokens_of_frame(self._side).places)
        films = iter([count * frame + 1 for count in pixels.get("frames", np.zeros(0, np.int64)).tolist()])
        image, video = self.config.image_token_id, self.config.video_token_id
        context = context_of(self.config)
        rows = []
        for sample in samples:
            pictures = [[image] * next(lengths) for _ in sample.pictures]
            videos = [[video] * next(films) for _ in sample.videos]
            with naming(sample):
                row = encode_row(
                    processor.tokenizer, sample, image, pictures, answer=answers, video_token=video, videos=videos
                )
                check_length(row, context, "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels, video)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward; short videos are filled up with frames of NaN, which are left out again."""
        arrays = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
            **{name: array for name, array in encoded.pixels.items() if name not in ("tiles", "frames")},
        }
        if "frames" in encoded.pixels:
            frames, counts = encoded.pixels["pixel_values_videos"], encoded.pixels["frames"]
            padded = np.full((len(counts), counts.max(), *frames.shape[1:]), np.nan, frames.dtype)
            padded[np.arange(counts.max()) < counts[:, None]] = frames
            arrays["pixel_values_videos"] = padded
        return arrays

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Tiles of pictures and, one by one, frames, with the patches of their tokens (`qe_edge.models.anyres`)."""
        pixels, found = encoded.pixels, dict[str, list[np.ndarray]]()
        for name, counts in (("pixel_values", "tiles"), ("pixel_values_videos", "frames")):
            if name in pixels:
                values = pixels[name].astype(np.float32, copy=False)
                found[name] = np.split(values, np.cumsum(pixels[counts])[:-1])
        pictures = map(Seen, found.get("pixel_values", []), self._tokens(pixels))
        videos = [seen_frames(frames, self._side) for frames in found.get("pixel_values_videos", [])]
        films = encoded.input_ids[encoded.image_mask] == self.config.video_token_id
        return [
            {"pixel_values": run.tiles, "token_places": run.tokens.places, "token_weights": run.tokens.weights}
            for run in seen_in_order(films, list(pictures), videos, self._side**2)
        ]

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """The overview and tiles of the only picture, or the one tile of one of several, and their tokens."""
        found = llava_onevision_pictures.picture_graph
        return found(processor.image_processor, self.config.image_token_id, self._side, self._most)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over tiles, projector over tokens, decoder with positions `[batch, sequence]`."""
        return llava_onevision_graphs.graphs(model)

    def _tokens(self, pixels: dict[str, np.ndarray]) -> list[Tokens]:
        """What the tokens of every picture are made of."""
        if "pixel_values" not in pixels:
            return []
        resolutions = [tuple(found) for found in self.config.image_grid_pinpoints]
        tile = self.config.vision_config.image_size
        alone = np.repeat(pixels["batch_num_images"] == 1, pixels["batch_num_images"])
        return [
            tokens_of_picture((height, width), resolutions, tile, self._side, self._most)
            if only
            else tokens_of_tile(self._side)
            for (height, width), only in zip(pixels["image_sizes"].tolist(), alone.tolist(), strict=True)
        ]
