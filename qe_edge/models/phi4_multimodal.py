"""Phi-4-multimodal with pictures: crops of any number through SigLIP, two projections, and Phi-4-mini's layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
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
from qe_edge.models.chat_templates import take_processor_template
from qe_edge.models.export_limits import context_of
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import HDValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.errors import QENotice
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import phi4_multimodal_graphs, phi4_multimodal_pictures, phi4_multimodal_projector
    from qe_edge.models.picture_graphs import PictureGraph
else:
    phi4_multimodal_graphs = lazy_module("qe_edge.models.phi4_multimodal_graphs")
    phi4_multimodal_pictures = lazy_module("qe_edge.models.phi4_multimodal_pictures")
    phi4_multimodal_projector = lazy_module("qe_edge.models.phi4_multimodal_projector")

LINE_END, SEPARATOR, FIRST = 0, 1, 2  # places of two learnt tokens, and of the first token of a crop


class Phi4Multimodal(ModelFamily):
    """Any `Phi4MultimodalForCausalLM`: texts and pictures.

    Audio is left out: no sample can name any, and the audio encoder stays in the checkpoint as it is.

    Example:
        >>> from transformers import Phi4MultimodalConfig
        >>> family = Phi4Multimodal(Phi4MultimodalConfig())
        >>> family.image_token_id, family.side  # tokens per side of a crop
        (200010, 16)
    """

    model_type = "phi4_multimodal"
    auto_class = "AutoModelForCausalLM"
    picture_unit = "tiles"
    has_vision_adapter = True

    @property
    def image_token_id(self) -> int:
        """Token at whose places features of pictures stand; config.json has it beside the vision encoder's sizes."""
        return int(self.config.vision_config.image_token_id)

    @property
    def side(self) -> int:
        """Tokens per side of a crop, each of two by two patches."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size // 2)

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision layers up to the one whose output is used, the projections, decoder layers; found by class."""
        return phi4_multimodal_graphs.blocks(model)

    def adapt(self, model: PreTrainedModel) -> None:
        """One call of the projections for all pictures; transformers calls them for each.

        Patches see all of their crop, as with eager attention. transformers' class calls its vision attention causal,
        and SDPA obeys where no crop of a call has filling, and there alone.
        """
        phi4_multimodal_projector.projector_of(model)
        phi4_multimodal_projector.see_whole_crops(model)

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "phi4_multimodal", HDValues)
        vision = self.config.vision_config
        check_equal(folder, "patch_size", image_processor.patch_size, vision.patch_size)
        size = [image_processor.size["height"], image_processor.size["width"]]
        check_equal(folder, "size", size, [vision.crop_size] * 2)
        check_chat_template(tokenizer, folder, self.image_token_id)
        return VisionLanguageProcessor(tokenizer, image_processor)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; each picture's image token is repeated as often as it has tokens."""
        pixels = prepare_pictures(processor.image_processor, samples)
        lengths = iter([len(places) for places in self._token_places(pixels)])
        image, rows = self.image_token_id, []
        for sample in samples:
            pictures = [[image] * next(lengths) for _ in sample.pictures]
            with naming(sample):
                row = encode_row(processor.tokenizer, sample, image, pictures, answer=answers)
                check_length(row, context_of(self.config), "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward; crops of a picture are padded to those of the one with most."""
        arrays = {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            "position_ids": self.position_ids(encoded),
        }
        if encoded.pixels:
            ends = list(self._ends(encoded.pixels))
            counts = np.diff([0, *ends])
            mask = np.arange(counts.max()) < counts[:, None]
            for name, filling in (("pixel_values", 0), ("patch_mask", 1)):
                crops = encoded.pixels[name]
                padded = np.full((*mask.shape, *crops.shape[1:]), filling, crops.dtype)
                padded[mask] = crops
                arrays["image_pixel_values" if name == "pixel_values" else "image_attention_mask"] = padded
            arrays["image_sizes"] = encoded.pixels["image_sizes"]
        return arrays

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """The crops of all pictures.

        `pixel_values` float32 `[crops, 3, side, side]`; `patch_mask` float32 `[crops, patches, patches]`, 0 on filling,
        which nothing attends to; `token_places` int64 `[tokens]`: 0 the end of a line, 1 what stands before the whole
        picture, from 2 the tokens of the crops, row by row.
        """
        if not encoded.pixels:
            return []
        feed = {name: encoded.pixels[name] for name in ("pixel_values", "patch_mask")}
        return [{**feed, "token_places": np.concatenate(list(self._token_places(encoded.pixels)))}]

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph:
        """The crops of one picture, and the places of its tokens."""
        return phi4_multimodal_pictures.picture_graph(processor.image_processor, self.image_token_id, self.side)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """Visual encoder over crops, projections over tokens, decoder with positions `[batch, sequence]`."""
        warnings.warn(
            "The audio encoder of this model is left out: graphs read texts and pictures.", QENotice, stacklevel=2
        )
        return phi4_multimodal_graphs.graphs(model)

    def _ends(self, pixels: dict[str, np.ndarray]) -> Iterator[int]:
        """For every picture the number of crops up to its last one."""
        end = 0
        for size in pixels["image_sizes"]:
            end += 1 + int((size // self.config.vision_config.crop_size).prod())
            yield end

    def _token_places(self, pixels: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
        """For every picture the places of its tokens, int64 `[tokens]`, as `visual_feeds` gives them."""
        start = 0
        for end, size in zip(self._ends(pixels) if pixels else (), pixels.get("image_sizes", ()), strict=False):
            rows, columns = (int(count) for count in size // self.config.vision_config.crop_size)
            numbers = FIRST + np.arange(start * self.side**2, end * self.side**2).reshape(-1, self.side, self.side)
            used = pixels["patch_mask"][start + 1 : end, ::2, ::2]
            crops, used = (_joined(array, rows, columns) for array in (numbers[1:], used))
            height, width = (int(used[line].sum()) for line in ((slice(None), 0), (0, slice(None))))
            lines = [_ended(crops[:height, :width]), np.array([SEPARATOR]), _ended(numbers[0])]
            yield np.concatenate(lines).astype(np.int64)
            start = end


def _joined(crops: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`[crops, height, width]`, row by row, as one array `[rows * height, columns * width]`."""
    height, width = crops.shape[1:]
    joined: np.ndarray = crops.reshape(rows, columns, height, width).swapaxes(1, 2)
    return joined.reshape(rows * height, columns * width)


def _ended(tokens: np.ndarray) -> np.ndarray:
    """Tokens `[height, width]` line by line, each line with its end."""
    ended: np.ndarray = np.pad(tokens, ((0, 0), (0, 1)), constant_values=LINE_END)
    return ended.ravel()
