"""Phi-4-multimodal's image processor without torchvision, which transformers' own needs: the same crops and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import ImagesKwargs

from qe_edge.models.torch_resize import BILINEAR, scale_frames

__all__ = ["Phi4MultimodalImageProcessorPil"]

WHITE = 255
SMALLEST = 10  # pixels of a side, after scaling
# torch's cubic with a = -0.75, halfway between two pixels
HALFWAY = (-0.09375, 0.59375, 0.59375, -0.09375)


class _Options(ImagesKwargs, total=False):
    """Settings of preprocessor_config.json besides every image processor's."""

    patch_size: int
    dynamic_hd: int


@dataclass(frozen=True)
class Layout:
    """How a picture becomes crops.

    Attributes:
        rows: Rows of crops.
        columns: Columns of crops.
        height: Height of the scaled picture in pixels; white fills the rest of the crops.
        width: Its width.
    """

    rows: int
    columns: int
    height: int
    width: int


class Phi4MultimodalImageProcessorPil(PilBackend):
    """Scales a picture until it touches two sides of a grid of crops, fills the rest, and adds a copy in one crop.

    Example:
        >>> processor = Phi4MultimodalImageProcessorPil()
        >>> processor.layout(height=480, width=640)
        Layout(rows=2, columns=2, height=672, width=896)
        >>> found = processor(images=[Image.new("RGB", (640, 480))])
        >>> found["pixel_values"].shape, found["image_sizes"].tolist()  # the whole picture comes first
        ((5, 3, 448, 448), [[896, 896]])
        >>> found["patch_mask"].sum((1, 2)).tolist()  # patches with something of the picture, of 32 x 32
        [1024.0, 1024.0, 1024.0, 512.0, 512.0]
    """

    valid_kwargs = _Options
    model_input_names = ["image_pixel_values", "image_sizes", "image_attention_mask"]  # noqa: RUF012 - transformers'
    size, patch_size, dynamic_hd, resample = {"height": 448, "width": 448}, 14, 36, 3
    do_resize, do_rescale, rescale_factor, do_normalize, do_convert_rgb = True, True, 1 / 255, True, True
    image_mean, image_std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]

    def to_dict(self) -> dict[str, Any]:
        """The settings, under the name that transformers' own class has."""
        return {**super().to_dict(), "image_processor_type": "Phi4MultimodalImageProcessor"}

    def preprocess(self, images: list[Image.Image], **_options: object) -> dict[str, np.ndarray]:
        """The crops of one picture.

        Returns:
            `pixel_values` float32 `[crops, 3, side, side]`, the whole picture and then the crops row by row;
            `patch_mask` float32 `[crops, patches, patches]`, 0 where a patch is filling; `image_sizes` int64 `[1, 2]`,
            height and width of all crops but the first together, in pixels.

        Raises:
            ValueError: If a side of the scaled picture is below ten pixels.
        """
        (picture,) = images
        pixels = np.asarray(picture.convert("RGB"))
        layout, side = self.layout(*pixels.shape[:2]), int(self.size["height"])
        if min(layout.height, layout.width) < SMALLEST:
            raise ValueError(f"it is so narrow that scaling makes it {layout.width}x{layout.height}")
        scaled = scale_frames(pixels[None], layout.height, layout.width, BILINEAR)[0]
        filled = np.full((layout.rows * side, layout.columns * side, 3), WHITE, np.uint8)
        filled[: layout.height, : layout.width] = scaled
        values = self.normalized(filled).transpose(2, 0, 1)
        whole = _thinned(_thinned(values, side).swapaxes(1, 2), side).swapaxes(1, 2)
        mask = self._mask(layout)
        return {
            "pixel_values": np.concatenate([whole[None], _cut(values, layout).swapaxes(0, 1)]),
            "patch_mask": np.concatenate([np.ones((1, *self._patches), np.float32), _cut(mask[None], layout)[0]]),
            "image_sizes": np.array([filled.shape[:2]], np.int64),
        }

    @property
    def _patches(self) -> tuple[int, int]:
        """Rows and columns of a crop's patches."""
        count = int(self.size["height"]) // self.patch_size
        return count, count

    def layout(self, height: int, width: int) -> Layout:
        """How a picture of so many pixels becomes crops."""
        side = int(self.size["height"])
        columns, rows = math.ceil(width / side), math.ceil(height / side)
        if columns * rows > self.dynamic_hd:
            columns, rows = self._grid(height, width)
        across, down = columns * side / width, rows * side / height
        if across < down:
            return Layout(rows, columns, int(height * across), columns * side)
        return Layout(rows, columns, rows * side, int(width * down))

    def grids(self) -> list[tuple[int, int]]:
        """Columns and rows of crops that a large picture may have, in the order in which they are tried."""
        most = self.dynamic_hd
        # a set, as transformers has it, whose order decides between equal grids
        sides = range(1, most + 1)
        fitting = {(c, r) for n in sides for c in range(1, n + 1) for r in range(1, n + 1) if c * r <= most}
        return sorted(fitting, key=math.prod)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of crops whose shape is nearest; of equally near ones the last that is not too large."""
        area = int(self.size["height"]) ** 2
        best, distance = (1, 1), math.inf
        for grid in self.grids():
            away = abs(width / height - grid[0] / grid[1])
            if away < distance or (away == distance and height * width > 0.5 * area * math.prod(grid)):
                best, distance = grid, away
        return best

    def _mask(self, layout: Layout) -> np.ndarray:
        """float32 `[rows of patches, columns of patches]`: 0 on patches of filling alone, counted from the far end."""
        side, (down, across) = int(self.size["height"]), self._patches
        mask = np.ones((layout.rows * down, layout.columns * across), np.float32)
        empty = (layout.rows * side - layout.height) // self.patch_size
        mask[mask.shape[0] - empty :] = 0
        empty = (layout.columns * side - layout.width) // self.patch_size
        mask[:, mask.shape[1] - empty :] = 0
        return mask

    def normalized(self, pixels: np.ndarray) -> np.ndarray:
        """float32 of uint8 `[height, width, 3]`, rescaled and normalized in one step."""
        scale = np.float32(1.0 / self.rescale_factor)
        mean, deviation = (np.asarray(value, np.float32) * scale for value in (self.image_mean, self.image_std))
        values: np.ndarray = (pixels.astype(np.float32) - mean) / deviation
        return values


def _cut(planes: np.ndarray, layout: Layout) -> np.ndarray:
    """`[channels, rows * height, columns * width]` as `[channels, crops, height, width]`, row by row."""
    channels, height, width = planes.shape
    parted = planes.reshape(channels, layout.rows, height // layout.rows, layout.columns, width // layout.columns)
    crops: np.ndarray = parted.swapaxes(2, 3)
    return crops.reshape(channels, layout.rows * layout.columns, *crops.shape[3:])


def _thinned(planes: np.ndarray, size: int) -> np.ndarray:
    """The last axis, a multiple of `size`, by torch's bicubic interpolation without antialiasing."""
    step = planes.shape[-1] // size
    if step % 2:  # the middle one of every `step` pixels
        return planes[..., step // 2 :: step]
    first = np.arange(size) * step + step // 2 - 2
    taps = [planes[..., np.clip(first + tap, 0, planes.shape[-1] - 1)] for tap in range(len(HALFWAY))]
    total: np.ndarray = taps[1] * np.float32(HALFWAY[1])
    for tap in (0, 2, 3):  # torch's order; it adds a product without rounding it, and in float64 one is exact
        total = (taps[tap].astype(np.float64) * HALFWAY[tap] + total).astype(np.float32)
    return total
