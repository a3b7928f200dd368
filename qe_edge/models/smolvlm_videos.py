"""Videos of SmolVLM: every frame is a tile in the prompt, behind the time at which it was taken."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import model_validator

from qe_edge.models.export_limits import context_of
from qe_edge.models.image_processors import Longest
from qe_edge.models.torch_resize import scale_frames
from qe_edge.models.video_values import SamplingValues, load_video_values, value_table
from qe_edge.system.errors import InputError

PLACE = "<video>"
# what transformers' processor renders a conversation with videos by, whatever template the model has
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
INTRODUCTION = "You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
SIZE = {"longest_edge": 4 * 364}
SKIPPED = 1.0  # seconds at both ends of a long video
SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


class SmolVideoValues(SamplingValues):
    """Settings of SmolVLM's videos: frames are scaled to a longest edge, then to a square of `max_image_size`."""

    size: Longest
    max_image_size: Longest

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:  # noqa: ANN401 - of a file
        """`video_sampling` of older files has the number of frames, their rate, and perhaps their size."""
        if not isinstance(values, dict):
            return values
        sampling = values.get("video_sampling")
        if not isinstance(sampling, dict):
            return {"size": SIZE, **values}
        size = {"size": sampling.get("video_size", SIZE)}
        return {**size, **values, "num_frames": sampling.get("max_frames"), "fps": sampling.get("fps")}

    @property
    def samples(self) -> bool:
        """Whether the settings choose some of the frames."""
        return self.do_sample_frames and self.num_frames is not None and self.fps is not None


@dataclass(frozen=True)
class SmolVideos:
    """Prepares videos as transformers' `SmolVLMVideoProcessor`.

    Attributes:
        values: The model's settings.
        tokens_of_frame: Tokens of a frame's features.
        max_tokens: Most tokens of the videos of a prompt; None for no such bound.

    Example:
        >>> videos = SmolVideos(SmolVideoValues(**SmolVideos.defaults), tokens_of_frame=64)
        >>> prepared = videos(images=[Image.new("RGB", (320, 240))] * 3)
        >>> prepared["pixel_values"].shape, prepared["frames"].tolist()
        ((3, 3, 364, 364), [3])
    """

    values: SmolVideoValues
    tokens_of_frame: int
    max_tokens: int | None = None

    defaults: ClassVar[Mapping[str, object]] = {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "max_image_size": {"longest_edge": 364},
        "resample": 1,
    }
    step: ClassVar[int] = 1
    times: ClassVar[bool] = True

    def chosen(self, count: int, fps: float) -> list[int]:
        """Numbers of the frames that the model's settings choose, of a video with `count` frames."""
        most, rate, seconds = self.values.num_frames or count, self.values.fps or fps, count / fps
        wanted = max(1, min(round(rate * seconds), most))
        start, end = 0, count - 1
        if seconds - 2 * SKIPPED > most * rate:
            start, end = int(SKIPPED * fps), min(int(count - SKIPPED * fps), count - 1)
        if start >= end:
            start, end = 0, count - 1
        return [int(number) for number in np.unique(np.linspace(start, end, wanted, dtype=int))]

    def tokens(self, frames: int, height: int, width: int) -> int:  # noqa: ARG002 - frames of any size become a tile
        """Tokens of the features of `frames` frames.

        Raises:
            InputError: If the settings scale frames in another way than this.
        """
        self.values.check_filter()
        if not self.values.do_resize:
            raise InputError(
                "This model's settings do not scale frames to one tile.",
                "Set do_resize to true in video_preprocessor_config.json.",
            )
        return frames * self.tokens_of_frame

    def __call__(self, *, images: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Tiles of frames of one size.

        Returns:
            `pixel_values` float32 `[frames, 3, side, side]`, and `frames` int64 `[1]`, their number.
        """
        values, side = self.values, self.values.max_image_size.longest_edge
        pixels = np.stack([np.asarray(image) for image in images])
        scaled = scale_frames(pixels, *self._target_size(*pixels.shape[1:3]), values.resample)
        scaled = scale_frames(scaled, side, side, values.resample)
        table = value_table(values)
        channels = [table[channel][scaled[..., channel]] for channel in range(3)]
        return {"pixel_values": np.stack(channels, axis=1), "frames": np.array([len(images)], np.int64)}

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width with the longest edge of the settings; the other is even."""
        longest, ratio = self.values.size.longest_edge, width / height
        if width >= height:
            other = int(longest / ratio)
            return max(other + other % 2, 1), longest
        other = int(longest * ratio)
        return longest, max(other + other % 2, 1)


def video_text(seconds: Sequence[float], duration: float, frame: str) -> str:
    r"""What stands in a video's place of the prompt.

    Args:
        seconds: When the frames were taken.
        duration: Of the video, in seconds.
        frame: What stands for a frame.

    Example:
        >>> video_text([0.0, 61.5], 62.0, "<image>")
        'You are provided the following series of two frames from a 0:01:02 [H:MM:SS]
        video.\n\nFrame from 00:00:<image>\nFrame from 01:01:<image>\n\n'
    """
    introduction = INTRODUCTION.format(count=in_words(len(seconds)), duration=timedelta(seconds=int(duration)))
    lines = [f"\nFrame from {int(time // 60):02d}:{int(time % 60):02d}:{frame}" for time in seconds]
    return f"{introduction}{''.join(lines)}\n\n"


def in_words(number: int) -> str:
    """A number below a million in English words, as num2words writes it.

    Example:
        >>> in_words(64), in_words(1101)
        ('sixty-four', 'one thousand, one hundred and one')
    """
    if number < 20:
        return SMALL[number]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f"-{SMALL[one]}" if one else "")
    unit, name = (100, "hundred") if number < 1000 else (1000, "thousand")
    whole, rest = divmod(number, unit)
    joint = " and " if rest < 100 else ", "
    return f"{in_words(whole)} {name}" + (f"{joint}{in_words(rest)}" if rest else "")


def load_smol_videos(folder: str, config: Any, tokens_of_frame: int) -> SmolVideos | None:  # noqa: ANN401 - of transformers
    """What prepares a model's videos; None if it is no SmolVLM, or has no settings for its vision encoder's size.

    Example:
        >>> from types import SimpleNamespace
        >>> load_smol_videos("a-model", SimpleNamespace(model_type="idefics3"), tokens_of_frame=64) is None
        True
    """
    if config.model_type != "smolvlm":
        return None
    values = load_video_values(folder, SmolVideoValues, SmolVideos.defaults)
    if values is None or values.max_image_size.longest_edge != config.vision_config.image_size:
        return None
    return SmolVideos(values, tokens_of_frame, context_of(config))


def with_video_template(tokenizer: Any) -> Any:  # noqa: ANN401 - tokenizers share no typed base
    """The same tokenizer with the template that transformers uses for conversations with videos.

    Example:
        >>> from types import SimpleNamespace
        >>> with_video_template(SimpleNamespace(chat_template="")).chat_template == TEMPLATE
        True
    """
    found = copy.copy(tokenizer)
    found.chat_template = TEMPLATE
    return found
