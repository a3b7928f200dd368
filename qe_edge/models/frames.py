"""The frames of an opened video: how many, how large, and a way to decode some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from qe_edge.system.errors import InputError

MAX_FRAMES = 1 << 14  # of one video, before a model's settings choose some


@dataclass(frozen=True)
class Frames:
    """A video whose frames can be decoded.

    Attributes:
        name: What messages call it.
        count: Number of frames.
        size: Width and height of the first frame.
        fps: Frames per second; None where nobody says.
        decode: The frames of these numbers, which ascend and may repeat, as 8-bit RGB.

    Example:
        >>> frames = Frames("A video", 2, (8, 8), None, lambda numbers: [Image.new("RGB", (8, 8)) for _ in numbers])
        >>> len(frames.read([0, 1, 1]))
        3
    """

    name: str
    count: int
    size: tuple[int, int]
    fps: float | None
    decode: Callable[[Sequence[int]], list[Image.Image]]

    def read(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Decode frames.

        Raises:
            InputError: If one cannot be decoded, or has another size than the first.
        """
        found = self.decode(numbers)
        for frame in found:
            if frame.size != self.size:
                one, other = ("x".join(map(str, size)) for size in (self.size, frame.size))
                raise InputError(f"{self.name} has frames of {one} and of {other} pixels.", "Give frames of one size.")
        return found


def check_frame_count(count: int, name: str = "A video") -> None:
    """Refuse a video without frames, or with more than anybody shows.

    Raises:
        InputError: If it is so.

    Example:
        >>> check_frame_count(8)  # fine
        >>> check_frame_count(0)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: A video has no frames. Give at least one.
    """
    if count < 1:
        raise InputError(f"{name} has no frames.", "Give at least one.")
    if count > MAX_FRAMES:
        raise InputError(f"{name} has {count} frames; up to {MAX_FRAMES} are read.", "Cut it, or give fewer frames.")
