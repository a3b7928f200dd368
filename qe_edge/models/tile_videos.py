"""Videos of InternVL: every frame is scaled to one tile and stands as a picture in the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from qe_edge.models.torch_resize import scale_frames
from qe_edge.models.video_values import TileVideoValues, value_table
from qe_edge.system.errors import InputError


@dataclass(frozen=True)
class TileVideos:
    """Prepares videos as transformers' `InternVLVideoProcessor`.

    Attributes:
        values: The model's settings.
        tokens_of_frame: Tokens that a frame has in the prompt, marks included.
        max_tokens: Most tokens of the videos of a prompt; None for no such bound.

    Example:
        >>> videos = TileVideos(TileVideoValues(**TileVideos.defaults), tokens_of_frame=258)
        >>> prepared = videos(images=[Image.new("RGB", (320, 240))] * 3)
        >>> prepared["pixel_values"].shape, prepared["num_patches"].tolist()
        ((3, 3, 384, 384), [3])
    """

    values: TileVideoValues
    tokens_of_frame: int
    max_tokens: int | None = None

    defaults: ClassVar[Mapping[str, object]] = {
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "size": {"height": 384, "width": 384},
    }
    step: ClassVar[int] = 1
    times: ClassVar[bool] = False

    def chosen(self, count: int, fps: float) -> list[int]:
        """Numbers of the frames that the model's settings choose, of a video with `count` frames.

        Raises:
            InputError: If the video has fewer than they ask for.
        """
        values = self.values
        wanted = values.num_frames or int(count / fps * (values.fps or 0))
        if not 0 < wanted <= count:
            raise InputError(
                f"A video of {count} frames is too short for the model's settings, which ask for {max(wanted, 1)}.",
                "Give more frames, or set every_frame.",
            )
        first = count / wanted / 2 if values.initial_shift is True else float(values.initial_shift)
        return [int(number) for number in np.arange(first, count, count / wanted).astype(np.float32)]

    def tokens(self, frames: int, height: int, width: int) -> int:  # noqa: ARG002 - frames of any size become a tile
        """Tokens of `frames` frames.

        Raises:
            InputError: If the settings scale frames in another way than this.
        """
        self.values.check_filter()
        if not self.values.do_resize or self.values.do_center_crop:
            raise InputError(
                "This model's settings do not scale frames to one tile.",
                "Set do_resize to true and do_center_crop to false in video_preprocessor_config.json.",
            )
        return frames * self.tokens_of_frame

    def __call__(self, *, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Tiles of frames of one size, under the names of a picture's.

        Returns:
            `pixel_values` float32 `[frames, 3, height, width]`, and `num_patches` int64 `[1]`, the number of frames.
        """
        size = self.values.size
        pixels = np.stack([np.asarray(image) for image in images])
        scaled = scale_frames(pixels, size.height, size.width, self.values.resample)
        table = value_table(self.values)
        channels = [table[channel][scaled[..., channel]] for channel in range(3)]
        return {"pixel_values": np.stack(channels, axis=1), "num_patches": np.array([len(images)], np.int64)}
