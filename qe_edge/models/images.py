"""Reading pictures that come from users."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from qe_edge.errors import InputError


def open_image(source: Path | Image.Image) -> Image.Image:
    """Read a picture completely, as RGB.

    Raises:
        InputError: If the file is missing, no picture, damaged or suspiciously large.
    """
    if isinstance(source, Image.Image):
        return _rgb(source)
    if not source.is_file():
        raise InputError(f"There is no picture '{source}'.", "Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return _rgb(image)
    except UnidentifiedImageError as error:
        raise InputError(f"'{source}' is not a picture.", "Give a PNG, JPEG or WebP file.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"'{source}' has too many pixels.", "Scale the picture down first.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"The picture '{source}' is damaged: {error}.", "Replace the file.") from error


def _rgb(image: Image.Image) -> Image.Image:
    converted: Image.Image = image.convert("RGB")  # reads the whole file
    return converted
