"""What MiniCPM-V 4.6's image processor of transformers makes of one picture, as arrays of patches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qe_edge.models.image_processors import MAX_PIXELS


@dataclass(frozen=True)
class Slices:
    """An image processor that gives the images of one picture as patches; too narrow a picture is refused."""

    image_processor: Any

    def __call__(self, *, images: list[Any], **arguments: Any) -> dict[str, np.ndarray]:  # noqa: ANN401 - its own
        """The whole picture, then its slices row by row.

        Returns:
            `pixel_values` float32 `[patches, values]`, row by row of every image; `target_sizes` int32 `[images, 2]`,
            rows and columns of its patches; `slices` int64 `[1, 2]`, rows and columns of slices, 0 where it is not cut.

        Raises:
            ValueError: If the picture is so narrow that scaling it gives too many pixels.
        """
        ((width, height),) = (picture.size for picture in images)
        pixels = self._pixels(height, width)
        if pixels > MAX_PIXELS:
            raise ValueError(f"scaled to whole patches it has {pixels} pixels, and up to {MAX_PIXELS} fit")
        found = self.image_processor(images=images, **arguments)
        side = self.image_processor.patch_size
        values = np.asarray(found["pixel_values"])[0]
        patches = values.reshape(*values.shape[:2], -1, side).transpose(2, 0, 1, 3)
        return {
            "pixel_values": np.ascontiguousarray(patches, np.float32).reshape(len(patches), -1),
            "target_sizes": np.asarray(found["target_sizes"]),
            "slices": np.array(found["grids"], np.int64),
        }

    def _pixels(self, height: int, width: int) -> int:
        """Pixels of the scaled picture, and of what its slices are cut from."""
        processor, size = self.image_processor, (height, width)
        options = (processor.scale_resolution, processor.patch_size, processor.downsample_mode)
        grid = None
        if processor.slice_mode:
            grid = processor.get_sliced_grid(size, processor.max_slice_nums, processor.scale_resolution)
        scaled: list[tuple[int, int]] = [processor.find_best_resize(size, *options, allow_upscale=grid is None)]
        if grid:
            scaled.append(processor.get_refine_size(size, grid, *options, allow_upscale=True))
        return sum(math.prod(one) for one in scaled)
