"""pi0's image processor without torchvision, which transformers' own needs: the same pixels to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend

from qe_edge.models.torch_resize import scale_frames

__all__ = ["PI0ImageProcessorPil"]


class PI0ImageProcessorPil(PilBackend):
    """Scales a picture until it fits into a square, and fills the rest, right and below, with zeros.

    Example:
        >>> processor = PI0ImageProcessorPil()
        >>> pixels = processor(images=[Image.new("RGB", (640, 480), "white")])["pixel_values"]
        >>> pixels.shape, pixels[0, 0, 167, 0], pixels[0, 0, 168, 0]  # 224 x 168 pixels of picture
        ((1, 3, 224, 224), np.float32(1.0), np.float32(0.0))
    """

    do_resize, resample, do_rescale, rescale_factor, do_normalize = True, 3, True, 1 / 255, True
    image_mean, image_std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
    size = {"max_height": 224, "max_width": 224}  # noqa: RUF012 - transformers' own
    pad_size = {"height": 224, "width": 224}  # noqa: RUF012 - transformers' own
    do_pad, do_convert_rgb, default_to_square, image_seq_length = True, True, False, 256

    def to_dict(self) -> dict[str, Any]:
        """The settings, under the name that transformers' own class has."""
        return {**super().to_dict(), "image_processor_type": "PI0ImageProcessor"}

    def preprocess(self, images: list[Image.Image], **_options: object) -> dict[str, np.ndarray]:
        """`pixel_values` float32 `[pictures, 3, height, width]`.

        Raises:
            ValueError: If a picture is so narrow that nothing is left of a side.
        """
        return {"pixel_values": np.stack([self._prepared(picture) for picture in images])}

    def _prepared(self, picture: Image.Image) -> np.ndarray:
        pixels = np.asarray(picture.convert("RGB"))[None]
        # as transformers, which rounds down: a side may become one pixel less than there is room for
        scale = min(self.size["max_height"] / pixels.shape[1], self.size["max_width"] / pixels.shape[2])
        height, width = int(pixels.shape[1] * scale), int(pixels.shape[2] * scale)
        if not height or not width:
            raise ValueError("it is too narrow to be scaled")
        values = scale_frames(pixels, height, width, int(self.resample))[0].astype(np.float32)
        factor = 1.0 / self.rescale_factor
        mean, deviation = (
            np.asarray(part, np.float32) * np.float32(factor) for part in (self.image_mean, self.image_std)
        )
        room = (self.pad_size["height"] - height, self.pad_size["width"] - width)
        padded = np.pad((values - mean) / deviation, ((0, room[0]), (0, room[1]), (0, 0)))
        return np.ascontiguousarray(padded.transpose(2, 0, 1))
