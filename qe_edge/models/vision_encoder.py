"""Vision encoders alone: pictures in, features out, no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from qe_edge.models.batching import check_no_robot, naming, prepare_pictures
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.system.errors import InputError, ModelError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qe_edge.models import vision_encoder_graphs
else:
    vision_encoder_graphs = lazy_module("qe_edge.models.vision_encoder_graphs")

MAX_PICTURES = 8  # of engines
PROBES = ((64, 48), (48, 64))  # sizes of pictures that show whether all of them get one size


@dataclass(frozen=True)
class PictureProcessor:
    """An image processor alone."""

    image_processor: Any


class VisionEncoder(ModelFamily):
    """Samples are pictures; questions and answers are not read.

    Class attributes:
        layer: Class of the encoder's layers.
    """

    auto_class = "AutoModel"
    writes_text = False
    siblings = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
    layer: ClassVar[str]

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Encoder layers."""
        return [
            Block(name, module, "visual")
            for name, module in model.named_modules()
            if type(module).__name__ == self.layer
        ]

    def save_processor(self, processor: PictureProcessor, folder: Path) -> None:
        """Write the image processor beside a checkpoint."""
        processor.image_processor.save_pretrained(folder)

    def encode(self, processor: PictureProcessor, samples: Sequence[Sample], *, answers: bool = False) -> Encoded:  # noqa: ARG002
        """Pixels of a batch of pictures; the token arrays are `[batch, 0]`.

        Raises:
            InputError: If a sample, which is named, has not exactly one picture, or one that cannot be read, or if
                the pictures become smaller than a patch.
        """
        kind = f"A '{self.model_type}' model"
        for sample in samples:
            with naming(sample):
                check_no_robot(sample)
                if not sample.pictures or sample.videos:
                    raise InputError(f"{kind} reads pictures only.", "Leave samples without a picture out.")
                if len(sample.pictures) > 1:
                    raise InputError(f"{kind} reads one picture at a time.", "Give every picture its own line.")
        pixels = prepare_pictures(processor.image_processor, samples)
        height, width = pixels["pixel_values"].shape[-2:]
        rows, columns = np.broadcast_to(self.config.patch_size, 2)
        if height < rows or width < columns:
            raise InputError(
                f"Pictures become {height} x {width} pixels for the model, and one of its patches has "
                f"{rows} x {columns}.",
                "Set a larger size in preprocessor_config.json, or give larger pictures.",
            )
        tokens = np.zeros((len(samples), 0), np.int64)
        return Encoded(tokens, tokens, tokens.astype(bool), tokens.astype(bool), pixels)

    def model_inputs(self, encoded: Encoded) -> dict[str, np.ndarray]:
        """`pixel_values` float32 `[batch, 3, height, width]`."""
        return self.visual_feeds(encoded)[0]

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """`pixel_values` float32 `[batch, 3, height, width]`."""
        return [{"pixel_values": np.ascontiguousarray(encoded.pixels["pixel_values"], np.float32)}]

    def position_ids(self, encoded: Encoded) -> np.ndarray:  # noqa: ARG002 - a family's interface
        """There are no text tokens.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            f"A '{self.model_type}' model has no text tokens.", "Use a vision-language model for questions."
        )

    def picture_size(self, processor: PictureProcessor) -> tuple[int, int]:
        """Height and width that every picture has after the image processor.

        Raises:
            ModelError: If pictures keep their own shapes.
        """
        sizes = {
            self.encode(processor, [Sample(Image.new("RGB", probe), "")]).pixels["pixel_values"].shape[-2:]
            for probe in PROBES
        }
        if len(sizes) > 1:
            raise ModelError(
                "The image processor keeps the shapes of pictures; an exported encoder takes pictures of one size.",
                "Set do_center_crop, or a height and a width, in preprocessor_config.json.",
            )
        height, width = sizes.pop()
        return int(height), int(width)

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:
        """The graph "visual" for pictures of the configuration's `image_size`."""
        height, width = (int(size) for size in np.broadcast_to(self.config.image_size, 2))
        return [self.encoder_graph(model, (height, width))]

    def encoder_graph(self, model: PreTrainedModel, size: tuple[int, int]) -> GraphSpec:
        """The graph "visual" for pictures of one height and width."""
        return vision_encoder_graphs.encoder_graph(model, size)
