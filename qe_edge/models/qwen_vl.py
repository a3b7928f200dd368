"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: patches of pictures of any size, a merger of 2 x 2 patches, M-RoPE."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

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
from qe_edge.models.family import Block, Encoded, ModelFamily, Sample
from qe_edge.models.image_processors import PatchValues, check_equal, load_image_processor
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PreTrainedModel

    from qe_edge.models import qwen_vl_pictures
    from qe_edge.models.graph_nodes import Nodes
    from qe_edge.models.picture_graphs import PictureGraph
else:
    qwen_vl_pictures = lazy_module("qe_edge.models.qwen_vl_pictures")


class QwenVL(ModelFamily):
    """A family that reads pictures as Qwen2-VL does.

    Class attributes:
        groups: "visual", "merger" or "language" by the name of a class that is a block.
    """

    picture_unit = "patches"
    groups: ClassVar[dict[str, str]]

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Vision blocks, the patch merger, decoder layers; found by class, not by path."""
        return [
            Block(name, module, self.groups[type(module).__name__])
            for name, module in model.named_modules()
            if type(module).__name__ in self.groups
        ]

    def load_processor(self, folder: str) -> VisionLanguageProcessor:
        """Tokenizer and the PIL image processor of `folder`."""
        tokenizer = load_tokenizer(folder, self.config.text_config.vocab_size)
        take_processor_template(tokenizer, folder)
        image_processor = load_image_processor(folder, "qwen2_vl", PatchValues)
        vision = self.config.vision_config
        check_equal(folder, "patch_size", image_processor.patch_size, vision.patch_size)
        check_equal(folder, "merge_size", image_processor.merge_size, vision.spatial_merge_size)
        check_equal(folder, "temporal_patch_size", image_processor.temporal_patch_size, vision.temporal_patch_size)
        check_chat_template(tokenizer, folder, self.config.image_token_id)
        return VisionLanguageProcessor(tokenizer, image_processor)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """One left-padded batch; each picture's image token is repeated once per merged patch."""
        pixels = prepare_pictures(processor.image_processor, samples)
        grids = iter(pixels.get("image_grid_thw", []))
        merge = self.config.vision_config.spatial_merge_size**2
        image = self.config.image_token_id
        rows = []
        context = self.config.get_text_config().max_position_embeddings
        for sample in samples:
            pictures = [[image] * (int(np.prod(next(grids))) // merge) for _ in sample.pictures]
            with naming(sample):
                row = encode_row(processor.tokenizer, sample, image, pictures, answer=answers)
                check_length(row, context, "A prompt")
            rows.append(row)
        return left_pad(rows, processor.tokenizer, image, pixels)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """Arguments of the model's forward."""
        return {
            "input_ids": encoded.input_ids,
            "attention_mask": encoded.attention_mask,
            **encoded.pixels,
            "mm_token_type_ids": encoded.image_mask.astype(np.int64),
        }

    def position_ids(self, encoded: Encoded) -> np.ndarray:
        """M-RoPE positions `[3, batch, sequence]`: text counts on, a picture spans its grid of merged patches."""
        grids = iter(encoded.pixels.get("image_grid_thw", []))
        merge = self.config.vision_config.spatial_merge_size
        positions = np.zeros((3, *encoded.input_ids.shape), np.int64)
        for row, (mask, images) in enumerate(zip(encoded.attention_mask, encoded.image_mask, strict=True)):
            parts: list[np.ndarray] = []
            current = 0
            for is_image, run in itertools.groupby(images[mask.astype(bool)]):
                length = len(list(run))
                if not is_image:
                    parts.append(np.tile(np.arange(current, current + length), (3, 1)))
                    current += length
                    continue
                while length:
                    frames, height, width = (int(size) for size in next(grids))
                    shape = (frames, height // merge, width // merge)
                    parts.append(np.indices(shape).reshape(3, -1) + current)
                    current += max(height, width) // merge
                    length -= int(np.prod(shape))
            valid = np.concatenate(parts, axis=1)
            positions[:, row, mask.astype(bool)] = valid
        return positions

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Patches of every picture, and of every frame: they attend to nothing outside of it.

        Patches come in groups of those that become one token: `pixel_values` float32 `[groups, patches, values]`;
        `position_ids` int64 `[groups, patches, 2]`, row and column; and what `frame_feeds` adds.
        """
        merge = self.config.vision_config.spatial_merge_size
        pixels = encoded.pixels["pixel_values"].astype(np.float32, copy=False)
        pixels = pixels.reshape(-1, merge**2, pixels.shape[-1])
        feeds: list[dict[str, np.ndarray]] = []
        start = 0
        for frames, height, width in encoded.pixels["image_grid_thw"].tolist():
            shared = {"position_ids": in_groups(np.indices((height, width)), merge), **self.frame_feeds(height, width)}
            for _ in range(frames):
                end = start + height * width // merge**2
                feeds.append({"pixel_values": pixels[start:end], **shared})
                start = end
        return feeds

    def picture_graph(self, processor: VisionLanguageProcessor) -> PictureGraph | None:
        """Scaling, patches, positions, and what `frame_nodes` adds."""
        return qwen_vl_pictures.picture_graph(processor.image_processor, self.config.image_token_id, self.frame_nodes)

    def frame_nodes(self, write: Nodes, rows: ir.Value, columns: ir.Value) -> dict[str, ir.Value]:  # noqa: ARG002
        """`frame_feeds` as nodes, of numbers of rows and columns of patches."""
        return {}

    def frame_feeds(self, height: int, width: int) -> dict[str, np.ndarray]:  # noqa: ARG002 - for families that need more
        """Further inputs of the visual encoder for a frame of `height` x `width` patches."""
        return {}


def in_groups(values: np.ndarray, merge: int) -> np.ndarray:
    """Bring values of patches `[n, height, width]` into the image processor's order `[groups, patches, n]`.

    The `merge` x `merge` patches of a group are neighbours, row by row, as the groups are.

    Example:
        >>> numbers = np.arange(16).reshape(1, 4, 4)  # of 4 x 4 patches
        >>> in_groups(numbers, merge=2)[:2, :, 0].tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    count, height, width = values.shape
    split = values.reshape(count, height // merge, merge, width // merge, merge)
    grouped = split.transpose(1, 3, 2, 4, 0).reshape(-1, merge**2, count)
    return np.ascontiguousarray(grouped)
