"""LFM2-VL's image processor without torchvision, which transformers' own needs: the same patches to the last bit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import ImagesKwargs

from qe_edge.models.torch_resize import scale_frames

__all__ = ["Lfm2VlImageProcessorPil"]


class _Options(ImagesKwargs, total=False):
    """Settings of preprocessor_config.json besides every image processor's."""

    downsample_factor: int
    do_image_splitting: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    min_image_tokens: int
    max_image_tokens: int
    encoder_patch_size: int
    tile_size: int
    max_pixels_tolerance: float
    return_row_col_info: bool


@dataclass(frozen=True)
class Layout:
    """How a picture becomes images for the vision encoder.

    Attributes:
        rows: Rows of tiles; 1 where it is not cut.
        columns: Columns of tiles.
        height: Height of the whole picture as one image, in pixels.
        width: Its width.
    """

    rows: int
    columns: int
    height: int
    width: int


class Lfm2VlImageProcessorPil(PilBackend):
    """Scales a picture; one that is too large for one image is cut into tiles, and a smaller copy of it follows.

    Example:
        >>> processor = Lfm2VlImageProcessorPil()
        >>> small, large = (Image.new("RGB", size) for size in ((320, 240), (1280, 720)))
        >>> processor.layout(240, 320), processor.layout(720, 1280)
        (Layout(rows=1, columns=1, height=256, width=320), Layout(rows=1, columns=2, height=384, width=672))
        >>> processor(images=[large])["grids"].tolist()[-2:]  # patches of the last tile, and of the whole picture
        [[32, 32], [24, 42]]
    """

    valid_kwargs = _Options
    model_input_names = ["pixel_values", "pixel_attention_mask", "spatial_shapes"]  # noqa: RUF012 - transformers' own
    downsample_factor, encoder_patch_size, tile_size = 2, 16, 512
    do_image_splitting, min_tiles, max_tiles, use_thumbnail = True, 2, 10, True
    min_image_tokens, max_image_tokens, max_pixels_tolerance = 64, 256, 2.0
    do_resize, size, resample = True, {"height": 512, "width": 512}, 2
    do_rescale, rescale_factor, do_normalize = True, 1 / 255, True
    do_pad, return_row_col_info = True, False
    image_mean, image_std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]

    def to_dict(self) -> dict[str, Any]:
        """The settings, under the name that transformers' own class has."""
        return {**super().to_dict(), "image_processor_type": "Lfm2VlImageProcessor"}

    def preprocess(self, images: list[Image.Image], **_options: object) -> dict[str, np.ndarray]:
        """The images of one picture, one after the other.

        Returns:
            `pixel_values` float32 `[patches, values]`, row by row of every image; `grids` int64 `[images, 2]`, rows and
            columns of its patches; `tiles` int64 `[1, 2]`, rows and columns of tiles, 1 where it is not cut.
        """
        (picture,) = images
        pixels = np.asarray(picture.convert("RGB"))[None]
        layout = self.layout(*pixels.shape[1:3])
        whole = self._scaled(pixels, layout.height, layout.width)
        parts = [whole]
        if layout.rows * layout.columns > 1:
            side = self.tile_size
            large = self._scaled(pixels, layout.rows * side, layout.columns * side)[0]
            split = large.reshape(layout.rows, side, layout.columns, side, 3).swapaxes(1, 2)
            parts = [split.reshape(-1, side, side, 3), *([whole] if self.use_thumbnail else [])]
        every = [image for part in parts for image in part]
        patch = self.encoder_patch_size
        return {
            "pixel_values": np.concatenate([self._patches(image) for image in every]),
            "grids": np.array([[image.shape[0] // patch, image.shape[1] // patch] for image in every], np.int64),
            "tiles": np.array([[layout.rows, layout.columns]], np.int64),
        }

    def layout(self, height: int, width: int) -> Layout:
        """How a picture of so many pixels becomes images."""
        factor = self.encoder_patch_size * self.downsample_factor
        fewest, most = (tokens * factor**2 for tokens in (self.min_image_tokens, self.max_image_tokens))
        near = [round(side / factor) * factor for side in (height, width)]
        rows, columns = 1, 1
        # transformers measures with the side of a patch at least, not of a token
        reached = math.prod(max(self.encoder_patch_size, side) for side in near)
        if self.do_image_splitting and self.max_tiles > 1 and reached > most * self.max_pixels_tolerance:
            columns, rows = self._grid(height, width)
        sides = [max(factor, side) for side in near]
        if math.prod(sides) > most:
            shrink = math.sqrt(height * width / most)
            sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        elif math.prod(sides) < fewest:
            grow = math.sqrt(fewest / (height * width))
            sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        return Layout(rows, columns, *sides)

    def grids(self) -> list[tuple[int, int]]:
        """Columns and rows of tiles that a large picture may have, in the order in which they are tried."""
        sides = range(1, self.max_tiles + 1)
        # a set, as transformers has it, whose order decides between equal grids
        found = {(c, r) for n in sides for c in range(1, n + 1) for r in range(1, n + 1)}
        fitting = [grid for grid in found if self.min_tiles <= math.prod(grid) <= self.max_tiles]
        return sorted(fitting, key=math.prod)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of tiles whose shape is nearest; of equally near ones the last that is not too large."""
        best, distance = (1, 1), math.inf
        for grid in self.grids():
            away = abs(width / height - grid[0] / grid[1])
            if away < distance or (
                away == distance and height * width > 0.5 * self.tile_size * self.tile_size * math.prod(grid)
            ):
                best, distance = grid, away
        return best

    def _scaled(self, pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        return scale_frames(pixels, height, width, int(self.resample))

    def normalized(self, image: np.ndarray) -> np.ndarray:
        """float32 of uint8 `[height, width, 3]`, rescaled and normalized in one step."""
        scale = 1.0 / self.rescale_factor if self.do_rescale else 1.0
        values = image.astype(np.float32)
        if self.do_normalize:
            mean, deviation = (
                np.asarray(value, np.float32) * np.float32(scale) for value in (self.image_mean, self.image_std)
            )
            values = (values - mean) / deviation
        elif self.do_rescale:
            values *= np.float32(self.rescale_factor)
        return values

    def _patches(self, image: np.ndarray) -> np.ndarray:
        """float32 `[patches, values]` of uint8 `[height, width, 3]`."""
        side = self.encoder_patch_size
        rows, columns = image.shape[0] // side, image.shape[1] // side
        parted = self.normalized(image).reshape(rows, side, columns, side, 3).swapaxes(1, 2)
        return np.ascontiguousarray(parted.reshape(rows * columns, -1))
