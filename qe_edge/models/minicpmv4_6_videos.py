"""Videos of MiniCPM-V 4.6: a frame a second, cut into slices as a picture is; frames between them may stand together.

transformers' video processor needs torchvision, and scales frames with torch. This one needs numpy alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from qe_edge.models.image_processors import MAX_PIXELS, MAX_TILES, Factor, Side
from qe_edge.models.minicpmv4_6_slices import Cut, cut
from qe_edge.models.torch_resize import scale_frames
from qe_edge.models.video_values import FILE, FrameCount, SamplingValues, value_table
from qe_edge.system.errors import InputError

LINE = 6  # black pixels between frames that stand together
TENTH = 0.1  # seconds between the frames that those of a long video are chosen from
Boolean = Annotated[bool, Field(strict=True)]


class SliceVideoValues(SamplingValues):
    """Settings of videos that are cut into slices.

    Attributes:
        patch_size: Pixels of a patch's side.
        scale_resolution: Pixels of a slice's side, about.
        max_slice_nums: Most slices of a frame.
        slice_mode: Whether frames are cut.
        downsample_mode: "16x" where 16 patches become a token, "4x" where four do.
        max_num_frames: Most seconds from which a frame each is seen; of a longer video as many are seen.
        stack_frames: Shares of a second whose frames are seen; all but the first stand together in one picture.
    """

    patch_size: Factor
    scale_resolution: Side
    max_slice_nums: Annotated[int, Field(strict=True, ge=1, le=MAX_TILES)]
    slice_mode: Boolean
    downsample_mode: Literal["16x", "4x"]
    max_num_frames: FrameCount
    stack_frames: Factor

    @property
    def samples(self) -> bool:
        """Whether the settings choose some of the frames."""
        return self.do_sample_frames


@dataclass(frozen=True)
class SliceVideos:
    """Prepares videos as transformers' `MiniCPMV4_6VideoProcessor`.

    Attributes:
        values: The model's settings.
        sizes: An image processor of this architecture, which knows how sizes follow from settings.
        max_tokens: Most tokens of the videos of a prompt; None for no such bound.

    Example:
        >>> from qe_edge.models.image_processors import pil_image_processor
        >>> values = SliceVideoValues.model_validate(SliceVideos.defaults)
        >>> videos = SliceVideos(values, pil_image_processor("minicpmv4_6")())
        >>> videos.units(10, fps=4.0), videos.unit_tokens([1, 1, 1], 240, 320)
        ([[0], [4], [8]], 189)
        >>> prepared = videos(images=[Image.new("RGB", (320, 240))] * 3)
        >>> prepared["target_sizes_videos"].tolist(), prepared["unit_grids"].tolist()
        ([[28, 36], [28, 36], [28, 36]], [[0, 0], [0, 0], [0, 0]])
    """

    values: SliceVideoValues
    sizes: Any
    max_tokens: int | None = None

    defaults: ClassVar[Mapping[str, object]] = {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "patch_size": 14,
        "scale_resolution": 448,
        "max_slice_nums": 9,
        "slice_mode": True,
        "downsample_mode": "16x",
        "do_sample_frames": True,
        "max_num_frames": 128,
        "stack_frames": 1,
    }
    step: ClassVar[int] = 1
    times: ClassVar[bool] = False

    def units(self, count: int, fps: float) -> list[list[int]]:
        """Numbers of the frames of every picture that is seen, of a video with `count` frames.

        Each second's first frame is one; frames of the rest of the second follow together, if the settings say so.
        """
        most, shares, seconds = self.values.max_num_frames, self.values.stack_frames, count / fps
        first: list[float] = list(range(math.ceil(seconds)))
        if seconds > most:
            first = [round(number * TENTH, 1) for number in range(int(seconds / TENTH))]
        between = [second + part / shares for second in range(math.ceil(seconds)) for part in range(1, shares)]
        later = _spread([time for time in between if time < seconds], most * (shares - 1))
        together = {int(second): list(group) for second, group in itertools.groupby(later, math.floor)}
        units: list[list[float]] = []
        for number, time in enumerate(_spread(first, most)):
            units += [[time], *([together[number]] if number in together else [])]
        return [[min(int(time * fps), count - 1) for time in unit] for unit in units]

    def unit_tokens(self, counts: Sequence[int], height: int, width: int) -> int:
        """Tokens of pictures that show so many frames each.

        Raises:
            InputError: If the model cannot read such frames, or the settings prepare them in another way than this.
        """
        values = self.values
        values.check_filter()
        if not values.do_resize or (values.stack_frames > 1 and not values.do_sample_frames):
            raise InputError(
                "This model's settings do not scale frames, or put frames together that were not chosen.",
                f"Set do_resize and do_sample_frames to true in {FILE}.",
            )
        joined = values.patch_size**2 * (4 if values.downsample_mode == "4x" else 16)
        sizes = {count: _size_together(count, height, width) for count in set(counts)}
        cuts = {count: self._cut(size) for count, size in sizes.items()}
        for count, found in cuts.items():
            if found.pixels > MAX_PIXELS:
                tall, wide = sizes[count]
                raise InputError(
                    f"Frames of {wide} x {tall} have {found.pixels} pixels where they are scaled to whole patches, and "
                    f"up to {MAX_PIXELS} fit.",
                    "Crop them.",
                )
        return sum(cuts[count].pixels // joined for count in counts)

    def joined(self, frames: Sequence[Image.Image], counts: Sequence[int]) -> list[Image.Image]:
        """Pictures that show so many frames each, in a grid with black lines."""
        waiting = iter(frames)
        return [_together(list(itertools.islice(waiting, count))) for count in counts]

    def __call__(self, *, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Patches of pictures that each show a frame, or several.

        Returns:
            `pixel_values_videos` float32 `[patches, values]`, and `target_sizes_videos` int32 `[images, 2]`, rows and
            columns of patches of every picture and its slices; `unit_grids` int64 `[pictures, 2]`, rows and columns of
            slices, 0 where it is not cut; `units` int64 `[1]`, the number of pictures.
        """
        side, patches, sizes, grids = self.values.patch_size, list[np.ndarray](), list[list[int]](), list[list[int]]()
        for image in images:
            found = self._cut((image.height, image.width))
            grids.append([found.rows, found.columns])
            for part in self._parts(np.asarray(image)[None], found):
                sizes.append([part.shape[0] // side, part.shape[1] // side])
                rows = part.reshape(sizes[-1][0], side, sizes[-1][1], side, 3)
                patches.append(rows.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side * side))
        table, whole = value_table(self.values), np.concatenate(patches)
        values = np.stack([table[channel][whole[:, channel]] for channel in range(3)], axis=1)
        return {
            "pixel_values_videos": values.reshape(len(whole), -1),
            "target_sizes_videos": np.array(sizes, np.int32),
            "unit_grids": np.array(grids, np.int64),
            "units": np.array([len(images)], np.int64),
        }

    def _cut(self, size: tuple[int, int]) -> Cut:
        values = self.values
        return cut(self.sizes, values, size)

    def _parts(self, picture: np.ndarray, found: Cut) -> list[np.ndarray]:
        """A picture uint8 `[1, height, width, 3]` as the whole of it and its slices, `[height, width, 3]`."""
        whole = scale_frames(picture, *found.whole, self.values.resample)[0]
        if not found.rows:
            return [whole]
        finer = scale_frames(picture, *found.finer, self.values.resample)[0]
        lines = np.split(finer, found.rows, axis=0)
        return [whole, *(part for line in lines for part in np.split(line, found.columns, axis=1))]


def _spread(times: Sequence[float], most: int) -> list[float]:
    """At most so many of some times, from the first to the last."""
    if len(times) <= most:
        return list(times)
    return [times[int(place)] for place in np.linspace(0, len(times) - 1, most, dtype=int)]


def _grid(count: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of frames that stand together: what is nearest to a square, of two to four."""
    if count == 4:
        return 2, 2
    if count not in (2, 3):
        return 1, count
    lines = (count - 1) * LINE
    across, down = ((count * width + lines) / height, width / (count * height + lines))
    if abs(across - 1) == abs(down - 1) and count == 2:
        return (1, 2) if width >= height else (2, 1)
    return (1, count) if abs(across - 1) <= abs(down - 1) else (count, 1)


def _size_together(count: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a picture that shows so many frames."""
    rows, columns = _grid(count, height, width)
    return rows * height + (rows - 1) * LINE, columns * width + (columns - 1) * LINE


def _together(frames: Sequence[Image.Image]) -> Image.Image:
    width, height = frames[0].size
    if len(frames) == 1:
        return frames[0]
    tall, wide = _size_together(len(frames), height, width)
    canvas, columns = Image.new("RGB", (wide, tall)), _grid(len(frames), height, width)[1]
    for number, frame in enumerate(frames):
        row, column = divmod(number, columns)
        canvas.paste(frame, (column * (width + LINE), row * (height + LINE)))
    return canvas
