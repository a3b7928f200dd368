"""Which frames of a video are seen, and how many tokens they become; known before any frame is prepared."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qe_edge.models.frames import Frames
from qe_edge.models.videos import Video, open_video
from qe_edge.system.errors import CommonNotice, InputError

TIMES = ("second_per_grid_ts", "frame_seconds", "duration")
DEFAULT_FPS = 24.0  # transformers' too
FPS_NOTICE = f"Some videos do not say how many frames a second they have, so {DEFAULT_FPS:g} are assumed."


@dataclass(frozen=True)
class Planned:
    """A video that is opened, before its frames are decoded.

    Attributes:
        frames: The video.
        numbers: The frames that the model sees.
        tokens: Number of tokens of their features.
        fps: Frames per second.
        seen_fps: Frames per second of the seen frames.
        together: How many of them stand in each picture that the model sees; None where each is one.
    """

    frames: Frames
    numbers: list[int]
    tokens: int
    fps: float
    seen_fps: float
    together: list[int] | None = None


def plan_videos(processor: Any, videos: Sequence[Video]) -> list[Planned]:  # noqa: ANN401 - it may be remembered
    """Open the videos of a prompt, and count their tokens before any work.

    Args:
        processor: A `QwenVideos`, a `SliceVideos`, or what stands for it.
        videos: The videos.

    Raises:
        InputError: If one cannot be read or prepared, or their tokens are too many.

    Example:
        >>> from qe_edge.models.qwen_vl_videos import QwenVideos, VideoValues
        >>> processor = QwenVideos(VideoValues(**QwenVideos.defaults), max_tokens=1000)
        >>> [plan] = plan_videos(processor, [Video(np.zeros((4, 320, 320, 3), np.uint8), fps=2)])
        >>> plan.numbers, plan.tokens
        ([0, 1, 2, 3], 288)
    """
    planned = [_planned(processor, video) for video in videos]
    total = sum(plan.tokens for plan in planned)
    if processor.max_tokens is not None and total > processor.max_tokens:
        largest = max(planned, key=lambda plan: plan.tokens)
        width, height = largest.frames.size
        raise InputError(
            f"{largest.frames.name} with {len(largest.numbers)} frames of {width} x {height} becomes {largest.tokens} "
            f"tokens, all videos {total}; up to {processor.max_tokens} fit.",
            "Show fewer or smaller frames, or raise --max-context.",
        )
    return planned


def _planned(processor: Any, video: Video) -> Planned:  # noqa: ANN401 - as above
    frames = open_video(video)
    sampled = processor.values.samples and not video.every_frame
    if frames.fps is None and (processor.times or sampled):
        warnings.warn(FPS_NOTICE, CommonNotice, stacklevel=2)
    fps = frames.fps or DEFAULT_FPS
    width, height = frames.size
    together = None
    if hasattr(processor, "units"):
        units = processor.units(frames.count, fps) if sampled else [[number] for number in range(frames.count)]
        numbers, together = [number for unit in units for number in unit], [len(unit) for unit in units]
        tokens = processor.unit_tokens(together, height, width)
    else:
        numbers = processor.chosen(frames.count, fps) if sampled else list(range(frames.count))
        tokens = processor.tokens(len(numbers), height, width)
    seen = DEFAULT_FPS if frames.fps is None else len(numbers) / frames.count * fps
    return Planned(frames, numbers, tokens, fps, seen, together)


def prepare_video(processor: Any, plan: Planned) -> dict[str, np.ndarray]:  # noqa: ANN401 - as above
    """Decode and prepare a video.

    Returns:
        What the processor returns, and `TIMES`: `second_per_grid_ts` float32 `[1]`, the seconds of a step of time;
        `frame_seconds` float64 `[steps of time]`, when each was taken, counted from the first frame; and `duration`
        float64 `[1]`, the seconds of the video.

    Raises:
        InputError: If a frame cannot be read.

    Example:
        >>> from qe_edge.models.qwen_vl_videos import QwenVideos, VideoValues
        >>> processor = QwenVideos(VideoValues(**QwenVideos.defaults))
        >>> [plan] = plan_videos(processor, [Video(np.zeros((4, 320, 320, 3), np.uint8), fps=2)])
        >>> prepare_video(processor, plan)["frame_seconds"].tolist()
        [0.25, 1.25]
    """
    step = processor.step
    numbers = [*plan.numbers, *[plan.numbers[-1]] * (-len(plan.numbers) % step)]
    seconds = np.array(numbers, np.float64).reshape(-1, step) / plan.fps
    images = plan.frames.read(plan.numbers)
    if plan.together is not None:
        images = processor.joined(images, plan.together)
    return {
        **processor(images=images),
        "second_per_grid_ts": np.array([step / plan.seen_fps], np.float32),
        "frame_seconds": (seconds[:, 0] + seconds[:, -1]) / 2,
        "duration": np.array([plan.frames.count / plan.fps if plan.frames.fps else plan.numbers[-1] / plan.fps]),
    }


def take_times(pixels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Take `TIMES` of all videos out of the prepared arrays of a batch; empty ones where there are no videos.

    Example:
        >>> pixels = {"pixel_values": np.zeros(3), "duration": np.array([2.0])}
        >>> {name: len(times) for name, times in take_times(pixels).items()}, list(pixels)
        ({'second_per_grid_ts': 0, 'frame_seconds': 0, 'duration': 1}, ['pixel_values'])
    """
    return {name: pixels.pop(name, np.zeros(0, np.float32)) for name in TIMES}
