"""From any pixel format to 8-bit RGB: orientation, transparency, more than 8 bits, arrays."""

from __future__ import annotations

import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from qe_edge.system.errors import CommonNotice, InputError

DEEP_NOTICE = (
    "Pictures of 16 or 32 bits are scaled to 8 bits, each by its own range: its smallest value becomes black, its "
    "largest white."
)
EXIF_NOTICE = "The EXIF data of some pictures cannot be read; they are taken as they are stored."
DEEP = ("I", "F")  # Pillow's modes of 32 bits; those of 16 bits begin with "I;16"
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
AS_STORED = 1  # EXIF's orientation of a picture that stands upright
ROWS = 256  # scaled at once, so that float64 takes little memory
BACKGROUND = (255, 255, 255)


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture that is in memory, as 8-bit RGB; an ordinary one keeps its values.

    Args:
        image: The picture.
        name: What messages call it.

    Raises:
        InputError: If it holds NaN or infinity.

    Example:
        >>> transparent = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
        >>> to_rgb(transparent, "A picture").getpixel((0, 0))
        (255, 255, 255)
    """
    image = _upright(image)
    if image.mode in DEEP or image.mode.startswith("I;16"):
        image = _eight_bits(image, name)
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow knows no way from premultiplied grey to colour
    if image.mode in TRANSPARENT or image.has_transparency_data:
        return _on_white(image.convert("RGBA"))
    rgb: Image.Image = image.convert("RGB")
    return rgb


def array_image(array: np.ndarray) -> Image.Image:
    """The picture that an array holds.

    Args:
        array: `[height, width]` of bool, integers or floats; `[height, width, 3 or 4]` of uint8, or of floats from 0 to
            1; with four channels the last is opacity.

    Raises:
        InputError: If the array is no picture.

    Example:
        >>> array_image(np.zeros((2, 3), bool)).size  # width and height
        (3, 2)
        >>> array_image(np.zeros((2, 3, 5), np.uint8))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: An array of uint8 [2, 3, 5] is no picture. Give [height, width], or
        [height, width, channels] with 3 or 4.
    """
    kind = f"{array.dtype} {list(array.shape)}"
    colour = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.ndim != 2 and not colour:
        raise InputError(
            f"An array of {kind} is no picture.", "Give [height, width], or [height, width, channels] with 3 or 4."
        )
    if array.dtype == np.uint8:
        return Image.fromarray(np.ascontiguousarray(array))
    floating = np.issubdtype(array.dtype, np.floating)
    if colour:
        # a comparison with NaN is false
        if not floating or not bool(((array >= 0) & (array <= 1)).all()):
            raise InputError(
                f"A colour picture is an array of {kind}, not of uint8 or of floats from 0 to 1.",
                "Convert it to uint8.",
            )
        return Image.fromarray(np.rint(array * 255.0).astype(np.uint8))
    if array.dtype == np.bool_:
        return Image.fromarray(array.astype(np.uint8) * np.uint8(255))
    if not floating and not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"An array of {kind} is no picture.", "Give integers or floats.")
    return Image.fromarray(_scaled(array, None, "A picture"))


def _upright(image: Image.Image) -> Image.Image:
    """The picture as the camera was held."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, AS_STORED) == AS_STORED:
            return image  # exif_transpose would copy it
        turned = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, TypeError, LookupError, AttributeError, struct.error, OverflowError):
        warnings.warn(EXIF_NOTICE, CommonNotice, stacklevel=2)
        return image
    return turned


def _on_white(image: Image.Image) -> Image.Image:
    ground = Image.new("RGB", image.size, BACKGROUND)
    ground.paste(image, mask=image.getchannel("A"))
    return ground


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """A grey picture of 8 bits; a value that the file calls transparent becomes so."""
    values = np.asarray(image)
    clear = image.info.get("transparency")
    hidden = values == clear if isinstance(clear, int) else None
    grey = Image.fromarray(_scaled(values, hidden, name))
    if hidden is not None:
        grey.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
    return grey


def _scaled(values: np.ndarray, hidden: np.ndarray | None, name: str) -> np.ndarray:
    """Values `[height, width]` from their smallest to their largest as uint8 from 0 to 255; all alike become 0.

    Raises:
        InputError: If there is NaN or infinity among them.
    """
    shown = values if hidden is None or hidden.all() else values[~hidden]
    low, high = float(shown.min()), float(shown.max())
    span = high - low
    if not np.isfinite(span):
        raise InputError(f"{name} holds values that are not finite.", "Replace NaN and infinity, for example by 0.")
    warnings.warn(DEEP_NOTICE, CommonNotice, stacklevel=2)
    scaled = np.zeros(values.shape, np.uint8)
    for start in range(0, len(values) if span > 0 else 0, ROWS):
        part = values[start : start + ROWS].astype(np.float64)
        scaled[start : start + ROWS] = np.rint(np.clip((part - low) / span, 0, 1) * 255)
    return scaled
