"""What MiniCPM-V 4.6's image processor of transformers makes of one picture: its sizes, and arrays of patches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qe_edge.models.image_processors import MAX_PIXELS
from qe_edge.models.token_order import in_token_order

MARKS = ("image_id_start", "image_id_end", "image_start", "image_end", "slice_start", "slice_end")
AT_ONCE = 10  # images of one run: as many as a picture has, so that memory does not grow with a video
NAMES = (("pixel_values", "target_sizes"), ("pixel_values_videos", "target_sizes_videos"))  # of pictures, of videos


@dataclass(frozen=True)
class Cut:
    """How a picture is cut; sizes are heights and widths in pixels.

    Attributes:
        whole: The scaled picture.
        rows: Rows of slices; 0 where it is not cut.
        columns: Slices of a row.
        finer: What slices are cut from; (0, 0) where it is not cut.
    """

    whole: tuple[int, int]
    rows: int = 0
    columns: int = 0
    finer: tuple[int, int] = (0, 0)

    @property
    def pixels(self) -> int:
        """Of the scaled picture and its slices."""
        return math.prod(self.whole) + math.prod(self.finer)


def cut(sizes: Any, values: Any, size: tuple[int, int]) -> Cut:  # noqa: ANN401 - transformers' own class, and settings
    """How a picture of a height and width is cut.

    Args:
        sizes: An image processor of this architecture.
        values: What holds the settings: an image processor too, or the settings of videos.
        size: Height and width.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> processor = pil_image_processor("minicpmv4_6")()
        >>> cut(processor, processor, (480, 640))
        Cut(whole=(392, 504), rows=1, columns=2, finer=(560, 784))
    """
    options = (values.scale_resolution, values.patch_size, values.downsample_mode)
    grid = None
    if values.slice_mode:
        grid = sizes.get_sliced_grid(size, values.max_slice_nums, values.scale_resolution)
    whole = tuple(sizes.find_best_resize(size, *options, allow_upscale=grid is None))
    if not grid:
        return Cut(whole)
    rows, columns = grid
    return Cut(whole, rows, columns, tuple(sizes.get_refine_size(size, grid, *options, allow_upscale=True)))


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
        pixels = cut(self.image_processor, self.image_processor, (height, width)).pixels
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


def slices_text(tokenizer: Any, token: str, counts: Sequence[int], across: int) -> str:  # noqa: ANN401 - share no base
    """What stands in a prompt for a picture: the whole of it, and its slices line by line.

    Args:
        tokenizer: Names the marks around them.
        token: Of a feature.
        counts: Features of the whole picture and of every slice.
        across: Slices of a line.

    Example:
        >>> from types import SimpleNamespace
        >>> marks = SimpleNamespace(**{f"{name}_token": f"<{name}>" for name in MARKS})
        >>> slices_text(marks, "*", [3, 1, 1], across=2)
        '<image_start>***<image_end><slice_start>*<slice_end><slice_start>*<slice_end>'
    """
    start, end, slice_start, slice_end = (getattr(tokenizer, f"{name}_token") for name in MARKS[2:])
    slices = [f"{slice_start}{token * count}{slice_end}" for count in counts[1:]]
    lines = ["".join(slices[place : place + across]) for place in range(0, len(slices), across or 1)]
    return f"{start}{token * counts[0]}{end}" + "\n".join(lines)


def image_feeds(
    pixels: dict[str, np.ndarray], films: np.ndarray, steps: tuple[int, ...]
) -> list[dict[str, np.ndarray]]:
    """Inputs of the visual encoder: images of one size that follow each other, up to `AT_ONCE`, in token order.

    Args:
        pixels: Patches and sizes of pictures and of videos, as `Slices` and `SliceVideos` make them.
        films: Bool `[tokens]`, for every token of an image whether it is a video's.
        steps: How many neighbours become one, step by step.

    Example:
        >>> pixels = {"pixel_values": np.zeros((48, 588)), "target_sizes": np.array([[4, 4], [4, 4], [4, 4]])}
        >>> [feed["pixel_values"].shape for feed in image_feeds(pixels, np.zeros(3, bool), (4, 4))]
        [(3, 16, 588)]
    """
    pictures, frames = (_images(pixels, name, sizes) for name, sizes in NAMES)
    feeds: list[dict[str, np.ndarray]] = []
    for _, run in in_token_order(films, pictures, frames, lambda image: math.prod(image[0]) // math.prod(steps)):
        for (rows, columns), group in itertools.groupby(run, lambda image: image[0]):
            order = together(rows, columns, len(steps))
            values = np.stack([patches for _, patches in group])[:, order]
            shares = [np.arange(size, dtype=np.float32) / np.float32(size) for size in (rows, columns)]
            places = np.stack(np.meshgrid(*shares, indexing="ij"), -1).reshape(1, -1, 2)[:, order]
            starts = range(0, len(values), AT_ONCE)
            feeds += [{"pixel_values": values[start : start + AT_ONCE], "places": places} for start in starts]
    return feeds


def _images(pixels: dict[str, np.ndarray], name: str, sizes: str) -> list[tuple[tuple[int, int], np.ndarray]]:
    """Rows and columns of every image, and its patches `[patches, values]`."""
    if name not in pixels:
        return []
    shapes = [(int(rows), int(columns)) for rows, columns in pixels[sizes]]
    ends = np.cumsum([rows * columns for rows, columns in shapes])
    return list(zip(shapes, np.split(pixels[name], ends[:-1]), strict=True))


def together(rows: int, columns: int, steps: int) -> np.ndarray:
    """Numbers of the patches of an image, those together that become one: first four, then four of these, and so on.

    Example:
        >>> together(2, 4, steps=1).tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
    """
    order = np.arange(rows * columns).reshape(rows, columns, 1)
    for _ in range(steps):
        down, across = order.shape[0] // 2, order.shape[1] // 2
        order = order.reshape(down, 2, across, 2, -1).swapaxes(1, 2).reshape(down, across, -1)
    return order.ravel()
