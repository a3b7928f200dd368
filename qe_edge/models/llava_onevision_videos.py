"""Videos of LLaVA-OneVision: every frame is scaled to one tile, and has a quarter of a tile's tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qe_edge.models.anyres import Tokens, joined, tokens_of_frame, widened
from qe_edge.models.export_limits import context_of
from qe_edge.models.tile_videos import TileVideos
from qe_edge.models.token_order import in_token_order
from qe_edge.models.video_values import TileVideoValues, load_video_values
from qe_edge.system.errors import InputError


@dataclass(frozen=True)
class FrameVideos(TileVideos):
    """Prepares videos as transformers' `LlavaOnevisionVideoProcessor`.

    Example:
        >>> videos = FrameVideos(TileVideoValues(**FrameVideos.defaults), tokens_of_frame=196)
        >>> prepared = videos(images=[Image.new("RGB", (320, 240))] * 3)
        >>> prepared["pixel_values_videos"].shape, prepared["frames"].tolist()
        ((3, 3, 384, 384), [3])
        >>> videos.tokens(3, 240, 320)  # the last one ends the video
        589
    """

    def chosen(self, count: int, fps: float) -> list[int]:
        """Numbers of the frames that the model's settings choose, of a video with `count` frames.

        Raises:
            InputError: If the video has fewer than they ask for.
        """
        values = self.values
        wanted = values.num_frames or max(1, int(count / fps * (values.fps or 0)))
        if wanted > count:
            raise InputError(
                f"A video of {count} frames is too short for the model's settings, which ask for {wanted}.",
                "Give more frames, or set every_frame.",
            )
        return [number * count // wanted for number in range(wanted)]

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of `frames` frames, and the one that ends a video.

        Raises:
            InputError: If the settings scale frames in another way than this.
        """
        return super().tokens(frames, height, width) + 1

    def __call__(self, *, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Tiles of frames of one size.

        Returns:
            `pixel_values_videos` float32 `[frames, 3, height, width]`, and `frames` int64 `[1]`, their number.
        """
        found = super().__call__(images=images)
        return {"pixel_values_videos": found["pixel_values"], "frames": found["num_patches"]}


def load_frame_videos(folder: str, config: Any, tokens_of_frame: int) -> FrameVideos | None:  # noqa: ANN401 - of transformers
    """What prepares a model's videos; None if the folder has no settings for its vision encoder's size.

    Raises:
        ModelError: If the settings are broken.

    Example:
        `load_frame_videos("llava-onevision", config, tokens_of_frame=196)`
    """
    values = load_video_values(folder, TileVideoValues, FrameVideos.defaults)
    if values is None or {values.size.height, values.size.width} != {config.vision_config.image_size}:
        return None
    return FrameVideos(values, tokens_of_frame, context_of(config))


@dataclass(frozen=True)
class Seen:
    """Tiles `[tiles, 3, height, width]` that are encoded together, and what their tokens are made of."""

    tiles: np.ndarray
    tokens: Tokens


def seen_frames(frames: np.ndarray, side: int) -> list[Seen]:
    """The frames `[frames, 3, height, width]` of a video, each alone; the last one has the token that ends the video.

    Example:
        >>> [len(seen.tokens.places) for seen in seen_frames(np.zeros((2, 3, 48, 48), np.float32), side=3)]
        [4, 5]
    """
    own = tokens_of_frame(side)
    end = Tokens(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))
    ended = joined([own, end], (0, 0))
    return [Seen(frames[n : n + 1], ended if n == len(frames) - 1 else own) for n in range(len(frames))]


def seen_in_order(
    films: np.ndarray, pictures: Sequence[Seen], videos: Sequence[Sequence[Seen]], patches: int
) -> list[Seen]:
    """What is encoded, run by run, in the order of the tokens; pictures that follow each other are one run.

    Args:
        films: As for `qe_edge.models.token_order.in_token_order`.
        pictures: In order.
        videos: In order, with the frames of each.
        patches: Of a tile.

    Example:
        >>> frame = seen_frames(np.zeros((1, 3, 48, 48), np.float32), side=3)
        >>> runs = seen_in_order(np.repeat([False, True], [10, 5]), [frame[0], frame[0]], [frame], patches=9)
        >>> [len(run.tokens.places) for run in runs]
        [10, 5]
    """
    frames = itertools.chain.from_iterable(videos)
    runs: list[Seen] = []
    for film, run in in_token_order(films, pictures, frames, lambda seen: len(seen.tokens.places)):
        if not film:
            tiles = np.cumsum([0, *(len(one.tiles) for one in run)])[:-1]
            tokens = joined([one.tokens for one in run], (tiles * patches).tolist())
            run = [Seen(np.concatenate([one.tiles for one in run]), tokens)]  # noqa: PLW2901 - as one
        runs += run
    taps = max((run.tokens.places.shape[1] for run in runs), default=0)
    return [Seen(run.tiles, widened(run.tokens, taps)) for run in runs]
