"""LFM2-VL: pictures of any size through SigLIP 2, cut into tiles where they are large, a projection, and LFM2."""

from __future__ import annotations

from collections.abc import Sequence
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
from qe_edge.models.image_processors import GridValues, check_equal, load_image_processor
from qe_edge.models.lfm2 import SIBLINGS
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.qwen_vl import in_groups
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import lfm2_vl_graphs, lfm2_vl_pictures
    from qe_edge.models.picture_graphs import PictureGraph
else:
    lfm2_vl_graphs = lazy_module("qe_edge.models.lfm2_vl_graphs")
    lfm2_vl_pictures = lazy_module("qe_edge.models.lfm2_vl_pictures")

START, END, OVERVIEW = "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"  # what transformers' processor writes


class Lfm2VL(ModelFamily):
    """Any `Lfm2VlForConditionalGeneration` with a `Siglip2VisionModel`, whatever its text model."""

    model_type = "lfm2_vl"
    picture_unit = "tiles"
    siblings: ClassVar[tuple[tuple[str, ...], ...]] = SIBLINGS

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers, the projector, decoder layers; found by class, so the text model may be any."""
        groups = {"Siglip2EncoderLayer": "visual", "Lfm2VlMultiModalProjector": "merger"}
        return [
            Block(name, module, groups.get(type(module).__name__, "language"))
            for name, module in model.named_modules()
            if type(module).__name__ in groups or type(module).__name__.endswith("DecoderLayer")
        ]

    def adapt(self, model: PreTrainedModel) -> None:
        """One call of the projector for all images; transformers calls it for each."""
        lfm2_vl_graphs.project_once(model)

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "lfm2_vl", GridValues)
        patch = self.config.vision_config.patch_size
        check_equal(folder, "encoder_patch_size", image_processor.encoder_patch_size, patch)
        factor = self.config.downsample_factor
        check_equal(folder, "downsample_factor", image_processor.downsample_factor, factor)
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        return VisionLanguageProcessor(tokenizer, image_processor)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; every tile has its place named and its tokens, as transformers' processor writes."""
        pixels = prepare_pictures(processor.image_processor, samples)
        grids, cut = pixels.get("grids", np.zeros((0, 2), np.int64)), iter(pixels.pop("tiles", ()))
        counts = iter((grids // self.config.downsample_factor).prod(1).tolist())
        image, rows = self.config.image_token_id, []
        context = context_of(self.config)
        for sample in samples:
            pictures = []
            for _ in sample.pictures:
                tiles = tuple(map(int, next(cut)))
                number = self._images(processor.image_processor, tiles)
                pictures.append(self._picture_ids(processor.tokenizer, tiles, [next(counts) for _ in range(number)]))
            with naming(sample):
                row = encode_row(processor.tokenizer, sample, image, pictures, answer=answers)
                check_length(row, context, "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward; images are padded to the one with most patches."""
        arrays = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
        }
        if encoded.pixels:
            grids, pixels = encoded.pixels["grids"], encoded.pixels["pixel_values"]
            counts = grids.prod(1)
            mask = np.arange(counts.max()) < counts[:, None]
            padded = np.zeros((*mask.shape, pixels.shape[1]), pixels.dtype)
            padded[mask] = pixels
            arrays |= {
                "pixel_values": padded,
                "spatial_shapes": grids,
                "pixel_attention_mask": mask.astype(np.int64),
            }
        return arrays

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Images of one size that follow each other, which attend to nothing outside of themselves.

        `pixel_values` float32 `[images, patches, values]`, patches of a token together; `point_weights` float32
        `[1, patches, points]`: how much of each learnt position a patch gets.
        """
        grids, pixels = encoded.pixels["grids"], encoded.pixels["pixel_values"]
        side, factor = round(self.config.vision_config.num_patches**0.5), self.config.downsample_factor
        feeds: list[dict[str, np.ndarray]] = []
        first = start = 0
        while first < len(grids):
            rows, columns = map(int, grids[first])
            count = int((np.cumsum((grids[first:] != grids[first]).any(1)) == 0).sum())
            order = in_groups(np.arange(rows * columns).reshape(1, rows, columns), factor).ravel()
            end = start + count * rows * columns
            images = pixels[start:end].reshape(count, rows * columns, -1)[:, order]
            weights = stretched(rows, side)[:, None, :, None] * stretched(columns, side)[None, :, None, :]
            weights = weights.reshape(1, rows * columns, side * side)[:, order]
            feeds.append({"pixel_values": images, "point_weights": np.ascontiguousarray(weights, np.float32)})
            first, start = first + count, end
        return feeds

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """Tiles, the whole picture, and their tokens with their places."""
        image_processor, image = processor.image_processor, self.config.image_token_id

        def tile_ids(rows: int, columns: int) -> list[int]:
            tiles = (max(rows, 1), max(columns, 1))
            return self._picture_ids(processor.tokenizer, tiles, [1] * self._images(image_processor, tiles))

        side = round(self.config.vision_config.num_patches**0.5)
        return lfm2_vl_pictures.picture_graph(image_processor, tile_ids, image, side)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over images of one size, projector over tokens, decoder with positions `[batch, sequence]`."""
        return lfm2_vl_graphs.graphs(model)

    def _images(self, image_processor: Any, tiles: tuple[int, ...]) -> int:  # noqa: ANN401 - share no typed base
        """Images of a picture in so many rows and columns of tiles."""
        count = int(np.prod(tiles))
        return count + (count > 1 and image_processor.use_thumbnail)

    def _picture_ids(self, tokenizer: Any, tiles: tuple[int, ...], counts: list[int]) -> list[int]:  # noqa: ANN401
        """Tokens of a picture: its tiles and where they stand, and the whole picture; `counts` are their features."""
        image = tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        rows, columns = tiles
        names = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(rows) for column in range(columns)]
        names = [""] if len(names) == 1 else [*names, OVERVIEW]
        text = "".join(name + image * count for name, count in zip(names, counts, strict=False))
        ids: list[int] = tokenizer(f"{START}{text}{END}", add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def stretched(size: int, side: int) -> np.ndarray:
    """Weights float64 `[size, side]` of `side` points for `size` patches along an axis.

    torch's `interpolate(mode="bilinear", antialias=True)`, without `align_corners`: triangles of the width of a point
    or of a patch, the larger of the two.

    Example:
        >>> stretched(4, 2).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    scale = side / size
    reach = max(scale, 1.0)
    center = scale * (np.arange(size) + 0.5)
    first = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    end = np.minimum((center + reach + 0.5).astype(np.int64), side)
    place = np.arange(side)
    weights = np.maximum(1 - np.abs((place - center[:, None] + 0.5) / reach), 0)
    weights = np.where((place >= first[:, None]) & (place < end[:, None]), weights, 0)
    # one after the other, so that `preprocess.onnx` adds them in the same order
    shares: np.ndarray = weights / weights.cumsum(1)[:, -1:]
    return shares
