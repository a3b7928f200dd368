"""Videos of the Qwen-VL families: which frames are seen, how large, and as which patches; equal to transformers' own.

transformers' video processors need torchvision, and scale frames with torch. These need numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from qe_edge.models.torch_resize import scale_frames
from qe_edge.models.video_values import VideoValues, value_table
from qe_edge.system.errors import InputError

MAX_ASPECT = 200
SMALLEST_SHARE = 1.05  # of the fewest pixels, which a frame keeps where the pixels of a video are capped
SHARE_OF_TOKENS = 0.9


@dataclass(frozen=True)
class QwenVideos:
    """Prepares videos as transformers' `Qwen2VLVideoProcessor`.

    Attributes:
        values: The model's settings.
        max_tokens: Most tokens of the videos of a prompt; None for no such bound.

    Example:
        >>> videos = QwenVideos(VideoValues(**QwenVideos.defaults))
        >>> prepared = videos(images=[Image.new("RGB", (320, 320))] * 3)
        >>> prepared["video_grid_thw"].tolist(), prepared["pixel_values_videos"].shape
        ([[2, 24, 24]], (1152, 1176))
    """

    values: VideoValues
    max_tokens: int | None = None

    defaults: ClassVar[Mapping[str, object]] = {
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    pixel_keys: ClassVar[bool] = True  # whether min_pixels and max_pixels of a file count
    times: ClassVar[bool] = False  # whether it matters when frames were taken

    def chosen(self, count: int, fps: float) -> list[int]:
        """Numbers of the frames that the model's settings choose, of a video with `count` frames.

        Raises:
            InputError: If the video has fewer than they ask for.
        """
        values, step = self.values, self.values.temporal_patch_size
        if values.num_frames is not None:
            wanted = round(values.num_frames / step) * step
        elif values.fps is not None:
            most = min(values.max_frames, count) // step * step
            wanted = math.floor(min(max(count / fps * values.fps, values.min_frames), most, count) / step) * step
        else:
            return list(range(count))
        if not 0 < wanted <= count:
            raise InputError(
                f"A video of {count} frames is too short for the model's settings, which ask for {max(wanted, step)}.",
                "Give more frames, or set every_frame.",
            )
        return [int(number) for number in np.arange(0, count, count / wanted).astype(np.float32)]

    @property
    def step(self) -> int:
        """Frames that become one step of time."""
        return self.values.temporal_patch_size

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of `frames` frames of one size.

        Raises:
            InputError: If the model cannot read such frames.
        """
        values, size = self.values, (height, width)
        values.check_filter()
        factor = values.patch_size * values.merge_size
        if values.do_resize:
            size = self.target_size(frames, height, width)
        elif height % factor or width % factor:
            raise InputError(
                f"A video has frames of {width} x {height}, which this model's settings do not scale.",
                f"Scale them to multiples of {factor} pixels.",
            )
        return -(-frames // self.step) * (size[0] // factor) * (size[1] // factor)

    def target_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of `frames` frames after scaling.

        Raises:
            InputError: If they are too narrow.
        """
        values = self.values
        factor = values.patch_size * values.merge_size
        fewest, most = values.size.shortest_edge, values.size.longest_edge
        if values.cap_pixels_per_frame:
            total = int(values.max_video_tokens * factor * factor * SHARE_OF_TOKENS)
            most = max(min(most, total * values.temporal_patch_size // frames), int(fewest * SMALLEST_SHARE))
        return _near_size(height, width, factor, (fewest, most))

    def __call__(self, *, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Patches of frames of one size, under transformers' names.

        Returns:
            `pixel_values_videos` float32 `[patches, values]`, and `video_grid_thw` int64 `[1, 3]`: steps of time, rows
            and columns of patches.
        """
        values = self.values
        pixels = np.stack([np.asarray(image) for image in images])
        if values.do_resize:
            pixels = scale_frames(pixels, *self.target_size(*pixels.shape[:3]), values.resample)
        step, patch, merge = values.temporal_patch_size, values.patch_size, values.merge_size
        pixels = np.concatenate([pixels, *[pixels[-1:]] * (-len(pixels) % step)])
        times, rows, columns = len(pixels) // step, pixels.shape[1] // patch, pixels.shape[2] // patch
        parted = pixels.reshape(times, step, rows // merge, merge, patch, columns // merge, merge, patch, 3)
        patches = parted.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, 3, step * patch**2)
        table = value_table(values)
        found = np.stack([table[channel][patches[:, channel]] for channel in range(3)], axis=1)
        grid = np.array([[times, rows, columns]], np.int64)
        return {"pixel_values_videos": found.reshape(len(patches), -1), "video_grid_thw": grid}


@dataclass(frozen=True)
class Qwen25Videos(QwenVideos):
    """The same; positions of Qwen2.5-VL follow from when frames were taken."""

    times: ClassVar[bool] = True


@dataclass(frozen=True)
class Qwen3Videos(QwenVideos):
    """Prepares videos as transformers' `Qwen3VLVideoProcessor`: numbers of pixels count all frames of a video."""

    defaults: ClassVar[Mapping[str, object]] = {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "do_sample_frames": True,
        "fps": 2.0,
        "max_video_tokens": 768,
    }
    pixel_keys: ClassVar[bool] = False
    times: ClassVar[bool] = True

    def chosen(self, count: int, fps: float) -> list[int]:
        """Numbers of the frames that the model's settings choose, of a video with `count` frames."""
        values, wanted = self.values, self.values.num_frames
        if wanted is None:
            asked = count if values.fps is None else int(count / fps * values.fps)
            wanted = min(max(asked, values.min_frames), values.max_frames, count)
        return [int(number) for number in np.linspace(0, count - 1, wanted).round()]

    def target_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width of `frames` frames after scaling.

        Raises:
            InputError: If they are too narrow or too few.
        """
        values, step = self.values, self.values.temporal_patch_size
        factor = values.patch_size * values.merge_size
        fewest, most = values.size.shortest_edge, values.size.longest_edge
        if frames < step:
            raise InputError(
                f"A video of {frames} frame is too short: the model reads {step} at a time.",
                f"Give at least {step} frames, or a picture.",
            )
        if values.cap_pixels_per_frame:
            share = min(values.max_video_tokens * factor * factor, most // frames)
            most = max(share, int(fewest * SMALLEST_SHARE)) * frames
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        return _near_size(height, width, factor, (fewest, most), frames, round(frames / step) * step)


def _near_size(
    height: int, width: int, factor: int, bounds: tuple[int, int], frames: int = 1, counted: int = 1
) -> tuple[int, int]:
    """Multiples of `factor` near a shape, with a number of pixels in bounds: transformers' `smart_resize`."""
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise InputError(
            f"Frames of {width} x {height} are too narrow: one side is more than {MAX_ASPECT} times the other.",
            "Crop them.",
        )
    fewest, most = bounds
    sides = (height, width)
    near = [round(side / factor) * factor for side in sides]
    area, pixels = frames * height * width, counted * near[0] * near[1]
    if pixels > most:
        ratio = math.sqrt(area / most)
        near = [max(factor, math.floor(side / ratio / factor) * factor) for side in sides]
    elif pixels < fewest:
        ratio = math.sqrt(fewest / area)
        near = [math.ceil(side * ratio / factor) * factor for side in sides]
    return near[0], near[1]
