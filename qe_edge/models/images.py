"""Reading pictures that come from users, the same way in calibration, evaluation, `run` and engines."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from qe_edge.models.pixel_formats import array_image, to_rgb
from qe_edge.models.texts import shortened
from qe_edge.system.c_output import held_stderr
from qe_edge.system.errors import REASON_LENGTH, CommonNotice, InputError, QENotice, shown_name

Picture = Path | str | Image.Image | np.ndarray | bytes
"""A file, the bytes of one, a PIL image, or an array (see `qe_edge.models.pixel_formats.array_image`)."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow reads more, some with the help of other programs
CONVERT = "Give a PNG, JPEG or WebP file; BMP, TIFF and GIF are read too."
MANY_SHOTS = "MPO"  # what Pillow calls a camera's JPEG with a preview behind it; the first is the photograph
MAX_PIXELS = 1 << 26  # of one picture; 8192 x 8192 take 200 MB as RGB
FRAMES_NOTICE = "Some pictures have several frames or pages; the first one is used."
HARMLESS = ("Unknown field", "unknown field", "unknown tag", "out of order")  # what libtiff says about tags of a maker
# what Pillow's readers raise on damaged files
DAMAGE = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, ArithmeticError, AttributeError, RuntimeError,
    AssertionError, struct.error, zlib.error,
)  # fmt: skip


def open_image(source: Picture) -> Image.Image:
    """Read a picture completely, as 8-bit RGB.

    The orientation that a camera notes is applied, what is transparent is put on white, more than 8 bits are scaled by
    the picture's own range, and of several frames the first is used.

    Raises:
        InputError: If the file is missing, no picture, damaged or too large.

    Example:
        >>> open_image(np.zeros((2, 3, 3), np.uint8)).size
        (3, 2)
    """
    if isinstance(source, np.ndarray):
        if source.ndim > 1:
            check_size((source.shape[1], source.shape[0]), "A picture")
        return to_rgb(array_image(source), "A picture")
    if isinstance(source, Image.Image):
        if source.format not in (None, *FORMATS, MANY_SHOTS):
            raise InputError(f"A picture is a {source.format} file.", CONVERT)
        return _read(source, "A picture")
    if isinstance(source, bytes):
        return _open(io.BytesIO(source), "A picture given as bytes")
    path = Path(source)
    name = f"'{shortened(str(path))}'"
    if not is_file(path):
        raise InputError(f"There is no picture {name}.", "Check the path.")
    return _open(path, name)


def is_file(path: Path) -> bool:
    r"""Whether a path is a file; a text that can be no path at all is none.

    Example:
        >>> _ = Path("a.png").write_bytes(b"")
        >>> is_file(Path("a.png")), is_file(Path("x" * 10_000))  # the second is too long for a path
        (True, False)
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_size(size: tuple[int, int], name: str) -> None:
    """Refuse a picture without pixels or with too many, by its width and height, before memory is taken for it.

    Raises:
        InputError: If it is so.

    Example:
        >>> check_size((1920, 1080), "A picture")  # fine
        >>> check_size((100_000, 100_000), "A picture")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: A picture has too many pixels: 100000 x 100000; up to 67 million are
        read. Scale the picture down first.
    """
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} has too many pixels: {width} x {height}; up to {MAX_PIXELS // 10**6} million are read.",
            "Scale the picture down first.",
        )
    if width * height == 0:
        raise InputError(f"{name} has no pixels.", "Replace the picture.")


def count_pixels(source: Picture) -> int:
    """How many pixels a picture will have, from a file's header alone.

    Returns:
        Width times height; 0 for what `open_image` refuses.

    Example:
        >>> count_pixels(np.zeros((2, 3, 3), np.uint8))
        6
    """
    if isinstance(source, np.ndarray):
        return int(source.shape[0] * source.shape[1]) if source.ndim > 1 else 0
    if isinstance(source, Image.Image):
        return int(source.width * source.height)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                return int(image.width * image.height)
    except (UnidentifiedImageError, Image.DecompressionBombError, *DAMAGE):
        return 0


def _open(file: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own bound is lower
            image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture of a known format.", CONVERT) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} has too many pixels.", "Scale the picture down first.") from error
    except PermissionError as error:
        raise InputError(f"The system refuses to read {name}.", "Change its permissions.") from error
    except DAMAGE as error:
        raise _damaged(name, error) from error
    with image:
        return _read(image, name)


def _read(image: Image.Image, name: str) -> Image.Image:
    check_size(image.size, name)
    try:
        if image.format != MANY_SHOTS and getattr(image, "is_animated", False):
            warnings.warn(FRAMES_NOTICE, CommonNotice, stacklevel=2)
            image.seek(0)
        if image.format == "TIFF":
            _load_tiff(image, name)
        image.load()
        return to_rgb(image, name)
    except Image.DecompressionBombError as error:  # a frame may be larger than the file's header says
        raise InputError(f"{name} has too many pixels.", "Scale the picture down first.") from error
    except MemoryError as error:  # Pillow says so of some damaged files too
        raise InputError(
            f"{name} is damaged, or there is too little memory to decode it.", "Replace the picture."
        ) from error
    except DAMAGE as error:
        raise _damaged(name, error) from error


def _load_tiff(image: Image.Image, name: str) -> None:
    """Decode a TIFF file. What libtiff prints becomes the reason of an error, or a notice about a file that is read."""
    failed, lines = None, []
    with held_stderr() as held:
        try:
            image.load()
        except OSError as error:
            failed = error
        lines = [
            line for line in held().decode(errors="replace").splitlines() if not any(tag in line for tag in HARMLESS)
        ]
    if failed is not None:
        raise OSError(lines[0] if lines else str(failed)) from failed
    if lines:
        warnings.warn(f"{name} may be damaged; libtiff says: {shown_name(lines[0], 200)}", QENotice, stacklevel=3)


def _damaged(name: str, error: BaseException) -> InputError:
    words = " ".join(str(error).split()).rstrip(".")
    why = shown_name(words, REASON_LENGTH) or type(error).__name__
    return InputError(f"The picture {name.removeprefix('A picture ')} is damaged: {why}.", "Replace the file.")
