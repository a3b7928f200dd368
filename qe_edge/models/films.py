"""Films: video files, decoded by PyAV where the extra `video` is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qe_edge.models.frames import Frames, check_frame_count
from qe_edge.models.images import check_size
from qe_edge.models.texts import shortened
from qe_edge.system.errors import REASON_LENGTH, InputError, shown_name
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import av
else:
    av = lazy_module("av")

FILM_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
PROTOCOLS = "file"  # a playlist could name others, which reach the network


def open_film(path: Path, fps: float | None) -> Frames:
    """Count the frames of a film and look at its size; nothing is decoded.

    Args:
        path: The file.
        fps: Frames per second; None for the file's own mean rate.

    Raises:
        InputError: If PyAV is not installed, or the file holds no video that it reads.

    Example:
        `open_film(Path("door.mp4"), None).read([0, 24, 48])`
    """
    name = f"'{shortened(str(path))}'"
    if find_spec("av") is None:
        raise InputError(
            f"{name} is a film, which needs PyAV.",
            "Run: pip install 'qe-edge[video]', or give a folder of frames or an animated GIF or WebP.",
        )
    with _opened(path, name) as (container, stream):
        count = sum(packet.size > 0 for packet in container.demux(stream))
        size, rate = (stream.width, stream.height), stream.average_rate
    check_frame_count(count, f"The film {name}")
    check_size(size, f"The film {name}")

    def decode(numbers: Sequence[int]) -> list[Image.Image]:
        wanted, found = set(numbers), {}
        with _opened(path, name) as (again, track):
            for number, frame in enumerate(again.decode(track)):
                if number in wanted:
                    found[number] = frame.to_image()
                if len(found) == len(wanted):
                    break
        if len(found) < len(wanted):
            raise InputError(f"The film {name} has fewer frames than its packets.", "Write it anew, or give a folder.")
        return [found[number] for number in numbers]

    return Frames(f"The film {name}", count, size, fps or (float(rate) if rate else None), decode)


@contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[Any, Any]]:
    try:
        with av.open(str(path), options={"protocol_whitelist": PROTOCOLS}) as container:
            if not container.streams.video:
                raise InputError(f"{name} holds no video.", "Give another file.")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # frames come in order, and no threads stay behind
            yield container, stream
    except (av.FFmpegError, OSError, ValueError) as error:
        words = " ".join(str(error).split()).rstrip(".")
        reason = shown_name(words, REASON_LENGTH) or type(error).__name__
        raise InputError(f"The film {name} cannot be read: {reason}.", "Write it anew, or give a folder.") from error
