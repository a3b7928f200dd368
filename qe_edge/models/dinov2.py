"""DINOv2: a vision encoder alone; pictures in, features out, no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qe_edge.models.batching import naming, prepare_pictures
from qe_edge.models.family import Block, Encoded, GraphSpec, ModelFamily, Sample
from qe_edge.models.image_processors import CropValues, load_image_processor
from qe_edge.system.errors import InputError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PictureProcessor:
    """An image processor alone."""

    image_processor: Any


class Dinov2(ModelFamily):
    """Any `Dinov2Model` of transformers. Samples are pictures; questions and answers are not read."""

    model_type = "dinov2"
    auto_class = "AutoModel"
    writes_text = False
    siblings = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Encoder layers."""
        return [
            Block(name, module, "visual")
            for name, module in model.named_modules()
            if type(module).__name__ == "Dinov2Layer"
        ]

    def load_processor(self, folder: str) -> PictureProcessor:
        """The PIL image processor of `folder`."""
        from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

        return PictureProcessor(load_image_processor(folder, BitImageProcessorPil, CropValues))

    def save_processor(self, processor: PictureProcessor, folder: Path) -> None:
        """Write the image processor beside a checkpoint."""
        processor.image_processor.save_pretrained(folder)

    def encode(self, processor: PictureProcessor, samples: Sequence[Sample], *, answers: bool = False) -> Encoded:  # noqa: ARG002
        """Pixels of a batch of pictures; the token arrays are `[batch, 0]`.

        Raises:
            InputError: If a sample, which is named, has not exactly one picture, or one that cannot be read, or if
                the pictures become smaller than a patch.
        """
        for sample in samples:
            with naming(sample):
                if sample.image is None:
                    raise InputError("A 'dinov2' model reads pictures only.", "Leave samples without a picture out.")
                if len(sample.pictures) > 1:
                    raise InputError(
                        "A 'dinov2' model reads one picture at a time.", "Give every picture its own line."
                    )
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

    def torch_inputs(self, encoded: Encoded) -> dict[str, torch.Tensor]:
        """`pixel_values` float32 `[batch, 3, height, width]`."""
        import torch

        return {"pixel_values": torch.from_numpy(self.visual_feeds(encoded)[0]["pixel_values"])}

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """`pixel_values` float32 `[batch, 3, height, width]`."""
        return [{"pixel_values": np.ascontiguousarray(encoded.pixels["pixel_values"], np.float32)}]

    def position_ids(self, encoded: Encoded) -> np.ndarray:  # noqa: ARG002 - a family's interface
        """There are no text tokens.

        Raises:
            ModelError: Always.
        """
        raise ModelError("A 'dinov2' model has no text tokens.", "Use a vision-language model for questions.")

    def graphs(self, model: PreTrainedModel) -> list[GraphSpec]:  # noqa: ARG002 - a family's interface
        """Not exported: engines are vision-language models or language models.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "A 'dinov2' model alone cannot be exported.", "Load the checkpoint with qe_edge.load_quantized in PyTorch."
        )
