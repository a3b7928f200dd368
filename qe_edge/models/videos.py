"""Videos that come from users: frames in order, from memory, a folder, an animated picture, or a film's file."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from qe_edge.models.films import FILM_ENDINGS, open_film
from qe_edge.models.frames import Frames, check_frame_count
from qe_edge.models.images import DAMAGE, Picture, check_size, count_pixels, is_file, open_image
from qe_edge.models.pixel_formats import to_rgb
from qe_edge.models.texts import shortened
from qe_edge.system.errors import REASON_LENGTH, InputError, shown_name

MAX_FPS = 1000.0
CHUNK = 1 << 20
MAX_PIXELS = 1 << 32  # of all frames of one file
PICTURE_ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMS = "Give a folder of frames, a list of pictures, or an animated GIF or WebP."
ANIMATED = ("GIF", "WEBP", "PNG")


@dataclass(frozen=True)
class Video:
    """A video that a user shows.

    Attributes:
        source: Its frames in order: a sequence of pictures as `qe_edge.models.images` opens them, an array uint8
            `[frames, height, width, 3]`, the path of a folder, of an animated GIF or WebP, or of a film, or the bytes
            of an animated GIF or WebP. A sequence is kept as a tuple, a path as `Path`.
        fps: Frames per second of the source; None for what its file says, or else the model's default.
        every_frame: Whether the model sees all frames. Otherwise some models' settings choose a part of them.

    Raises:
        InputError: If there is no frame, or no such rate.

    Example:
        >>> frames = [np.zeros((56, 56, 3), np.uint8)] * 4
        >>> video = Video(frames, fps=2)
        >>> len(video.source), video.fps
        (4, 2.0)
    """

    source: Sequence[Picture] | np.ndarray | Path | str | bytes
    fps: float | None = None
    every_frame: bool = False

    def __post_init__(self) -> None:
        source: object = self.source
        if isinstance(source, str):
            source = Path(source)
        elif isinstance(source, np.ndarray):
            if source.ndim != 4:
                raise InputError(
                    f"A video is an array of {source.dtype} {list(source.shape)}.",
                    "Give [frames, height, width, 3], or a list of pictures.",
                )
            source = tuple(source)
        elif isinstance(source, list | tuple):
            source = tuple(Path(frame) if isinstance(frame, str) else frame for frame in source)
            odd = next((f for f in source if not isinstance(f, Path | Image.Image | np.ndarray | bytes)), None)
            if odd is not None:
                raise InputError(f"A frame of a video is a {type(odd).__name__}.", "Give pictures as frames.")
        elif not isinstance(source, Path | bytes):
            raise InputError(f"A video is a {type(source).__name__}.", FORMS)
        if isinstance(source, tuple):
            check_frame_count(len(source))
        object.__setattr__(self, "source", source)
        rate: object = self.fps
        if rate is not None:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= MAX_FPS:
                raise InputError(
                    f"{rate!r} frames per second are no rate of a video.", f"Give a number above 0, up to {MAX_FPS:g}."
                )
            object.__setattr__(self, "fps", float(rate))

    def __eq__(self, other: object) -> bool:
        """Whether it is the same video: arrays and PIL images are compared by identity."""
        if not isinstance(other, Video):
            return NotImplemented
        return (self.identity, self.fps, self.every_frame) == (other.identity, other.fps, other.every_frame)

    def __hash__(self) -> int:
        return hash((self.identity, self.fps, self.every_frame))

    @property
    def identity(self) -> object:
        """A hashable value that two videos share if they are made from the same files or objects."""
        if isinstance(self.source, tuple):
            return tuple(frame if isinstance(frame, Path | bytes) else id(frame) for frame in self.source)
        return self.source


def open_video(video: Video) -> Frames:
    """Count the frames of a video and look at the first, without decoding the others.

    Raises:
        InputError: If its source cannot be read, or has no or too many frames.

    Example:
        >>> frames = open_video(Video(np.zeros((3, 28, 56, 3), np.uint8), fps=2))
        >>> frames.count, frames.size, frames.fps
        (3, (56, 28), 2.0)
        >>> [frame.size for frame in frames.read([0, 2])]
        [(56, 28), (56, 28)]
    """
    source = video.source
    if isinstance(source, tuple):
        return _listed(source, video.fps, "A video")
    if isinstance(source, bytes):
        return _animated(source, "A video given as bytes", video.fps)
    path = Path(str(source))
    name = f"'{shortened(str(path))}'"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURE_ENDINGS and file.is_file())
        if not files:
            raise InputError(f"The folder {name} holds no pictures.", "Give a folder of frames as PNG or JPEG.")
        return _listed(tuple(files), video.fps, f"The video {name}")
    if not is_file(path):
        raise InputError(f"There is no video {name}.", "Check the path.")
    if path.suffix.lower() in FILM_ENDINGS:
        return open_film(path, video.fps)
    return _animated(path, name, video.fps)


def content_of(video: Video) -> Iterator[bytes]:
    """Bytes that are the same for the same video: of its file, or the size and the pixels of every frame.

    Raises:
        InputError: If it cannot be read.

    Example:
        >>> [len(part) for part in content_of(Video(np.zeros((2, 4, 8, 3), np.uint8)))]
        [6, 96, 6, 96]
    """
    frames, source = open_video(video), video.source
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, Path) and source.is_file():
        with source.open("rb") as file:
            while part := file.read(CHUNK):
                yield part
    else:
        for number in range(frames.count):
            [frame] = frames.read([number])
            yield f"{frame.size}".encode()
            yield frame.tobytes()


def _listed(pictures: Sequence[Picture], fps: float | None, name: str) -> Frames:
    """Frames that are pictures each; the first is decoded for its size."""
    check_frame_count(len(pictures), name)
    return Frames(
        name, len(pictures), open_image(pictures[0]).size, fps, lambda chosen: [open_image(pictures[i]) for i in chosen]
    )


def count_video_pixels(video: Video) -> int:
    """How many pixels all frames of a video have, from headers alone; 0 for what `open_video` refuses.

    Example:
        >>> count_video_pixels(Video(np.zeros((3, 28, 56, 3), np.uint8)))
        4704
    """
    if isinstance(video.source, tuple):
        return sum(count_pixels(frame) for frame in video.source)
    try:
        frames = open_video(Video(video.source, fps=1.0))  # with a rate nothing has to be decoded
    except InputError:
        return 0
    return frames.count * frames.size[0] * frames.size[1]


def _animated(file: Path | bytes, name: str, fps: float | None) -> Frames:
    """Frames of an animated GIF, WebP or PNG; their mean rate follows from the file's durations."""
    called = f"The video {name}" if isinstance(file, Path) else name
    with _picture(file, name) as image:
        count, size = int(getattr(image, "n_frames", 1)), image.size
        check_frame_count(count, called)
        check_size(size, called)
        if count * size[0] * size[1] > MAX_PIXELS:
            raise InputError(
                f"{called} has {count} frames of {size[0]} x {size[1]}; up to {MAX_PIXELS // 10**6} million pixels are "
                "read.",
                "Scale it down, or cut it.",
            )
        durations = [] if fps is not None else [_duration(image, number) for number in range(count)]
    total = sum(durations)
    rate = fps if fps is not None else 1000 * count / total if total > 0 else None

    def decode(numbers: Sequence[int]) -> list[Image.Image]:
        found: dict[int, Image.Image] = {}
        with _picture(file, name) as again:
            for number in sorted(set(numbers)):
                again.seek(number)
                again.load()
                found[number] = to_rgb(again, called)
        return [found[number] for number in numbers]

    return Frames(called, count, size, rate, decode)


def _duration(image: Image.Image, number: int) -> float:
    """Milliseconds that a frame of an animated picture is shown."""
    image.seek(number)
    image.load()  # WebP knows a frame's duration once it is decoded
    return float(image.info.get("duration", 0))


@contextmanager
def _picture(file: Path | bytes, name: str) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=ANIMATED)
        with opened as image:
            yield image
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is no video of a known format.", FORMS) from error
    except (Image.DecompressionBombError, MemoryError, *DAMAGE) as error:
        reason = shown_name(" ".join(str(error).split()).rstrip("."), REASON_LENGTH) or type(error).__name__
        raise InputError(f"The video {name.removeprefix('A video ')} is damaged: {reason}.", "Replace it.") from error
