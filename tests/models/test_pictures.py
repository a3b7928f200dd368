"""Pictures that users give: what cannot be used is refused with one sentence and a remedy."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from qe_edge.errors import InputError
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import load_model

MakePicture = Callable[[int, int], Image.Image]


def png_that_claims(width: int, height: int) -> bytes:
    """A well-formed PNG of a few bytes whose header announces `width` x `height` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 4096)) + chunk(b"IEND", b"")


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_image(path)
    assert str(path) in caught.value.problem
    assert caught.value.remedy
    return caught.value.problem


def test_a_missing_file(tmp_path: Path) -> None:
    assert "no picture" in refusal(tmp_path / "nothing.png")


def test_a_folder(tmp_path: Path) -> None:
    assert "no picture" in refusal(tmp_path)


def test_text_called_png(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not a picture at all", encoding="utf-8")
    assert "not a picture" in refusal(path)


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.jpg"
    path.touch()
    assert "not a picture" in refusal(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_picture(tmp_path: Path, picture: MakePicture, kind: str) -> None:
    buffer = io.BytesIO()
    picture(80, 80).save(buffer, kind)
    whole = tmp_path / "whole"
    whole.write_bytes(buffer.getvalue())
    assert open_image(whole).size == (80, 80)
    path = tmp_path / "half"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_claims(side, side))
    assert "too many pixels" in refusal(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_pixel_format_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    Image.new(mode, (20, 10)).save(path)
    assert open_image(path).mode == "RGB"


def test_a_shape_that_the_processor_refuses(picture: MakePicture) -> None:
    loaded = load_model("demo")
    with pytest.raises(InputError, match="2x600"):
        loaded.family.encode(loaded.processor, [Sample(picture(2, 600), "what is it?")])
