"""A folder of calibration data: JSONL files, or pictures with captions beside them.

Pictures lie in the folder or below. A `.txt` file of the same name holds a picture's caption. Hidden files, as macOS
and file managers leave them ("._a.png"), are skipped. Nothing outside the folder is read, wherever links point.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from qe_edge.calibration.captions import CAPTION_PROMPT
from qe_edge.models.family import Sample
from qe_edge.system.errors import CalibrationError, InputError, QENotice
from qe_edge.system.json_files import MEBIBYTE, read_bounded_text

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREAD = (
    ".heic",
    ".heif",
    ".avif",
    ".jxl",
    ".jp2",
    ".svg",
    ".psd",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".exr",
    ".pgm",
    ".ppm",
)
CAPTION, LINES = ".txt", ".jsonl"


def read_folder(folder: Path) -> tuple[list[Path], list[Sample]]:
    """List the calibration data of a folder.

    Returns:
        Its JSONL files in alphabetical order, and its pictures with their captions if there is no JSONL file.

    Raises:
        CalibrationError: If a link leaves the folder, or a caption cannot be read.

    Example:
        >>> from PIL import Image
        >>> Path("photos").mkdir()
        >>> Image.new("RGB", (8, 8)).save("photos/cat.png")
        >>> _ = Path("photos/cat.txt").write_text("A black cat.")
        >>> lines, samples = read_folder(Path("photos"))
        >>> lines, samples[0].question, samples[0].answer
        ([], 'Describe the picture.', 'A black cat.')
    """
    lines = sorted(path for path in folder.glob(f"*{LINES}") if not path.name.startswith("."))
    for path in lines:
        _check_inside(path, folder)
    return lines, [] if lines else _pictures(folder)


def _pictures(folder: Path) -> list[Sample]:
    files = _walk(folder)
    unread = [path for path in files if path.suffix.lower() in UNREAD]
    if unread:
        warnings.warn(
            f"{len(unread)} files of '{folder}' are in formats that are not read, for example '{unread[0].name}'; "
            "convert them to PNG or JPEG to use them.",
            QENotice,
            stacklevel=2,
        )
    return [_captioned(path, folder) for path in files if path.suffix.lower() in PICTURES]


def _walk(folder: Path) -> list[Path]:
    """All files in alphabetical order of their paths; a linked folder is read where it really lies, so only once."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if Path(place, name).is_symlink():
                _check_inside(Path(place, name), folder)
        found += [Path(place, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _captioned(picture: Path, folder: Path) -> Sample:
    _check_inside(picture, folder)
    caption = picture.with_suffix(CAPTION)
    answer = None
    if caption.is_file():
        _check_inside(caption, folder)
        remedy = "Save the caption as UTF-8."
        answer = read_bounded_text(caption, error=CalibrationError, remedy=remedy, limit=MEBIBYTE).strip()
    try:
        return Sample(picture, CAPTION_PROMPT, answer, origin=f"'{picture}'" if answer is None else f"'{caption}'")
    except InputError as error:
        raise CalibrationError(f"'{caption}': {error.problem}", error.remedy) from error


def _check_inside(path: Path, folder: Path) -> None:
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a circle of links
        inside = False
    if not inside:
        raise CalibrationError(
            f"The link '{path}' points outside '{folder}'.", "Copy what it points at into the folder ('cp -rL')."
        )
