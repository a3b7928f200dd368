"""Pictures that users give: what cannot be used is refused with one sentence and a remedy."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from qe_edge.models import batching
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import load_model
from qe_edge.models.samples import Turn
from qe_edge.system.errors import CommonNotice, InputError

DAMAGE = (AssertionError, AttributeError, EOFError, IndexError, OSError, struct.error, SyntaxError, ZeroDivisionError)
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


@pytest.mark.parametrize("kind", DAMAGE)
def test_whatever_pillow_raises_about_a_picture(
    tmp_path: Path, picture: MakePicture, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(image: Image.Image) -> None:
        raise kind("inside Pillow")

    path = tmp_path / "picture.png"
    picture(8, 8).save(path)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert "is damaged: inside Pillow" in refusal(path)


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


@pytest.mark.parametrize("side", [10_000, 60_000])  # Pillow itself refuses only the second
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


def levels(picture: Image.Image) -> list[int]:
    """Grey values of a picture's first row."""
    assert picture.mode == "RGB"
    return [int(value) for value in np.asarray(picture)[0, :, 0]]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
def test_an_ordinary_picture_keeps_its_values(tmp_path: Path, picture: MakePicture, mode: str, kind: str) -> None:
    path = tmp_path / "picture"
    image = picture(24, 16).convert(mode)
    image = image.convert("L" if mode == "P" else "RGB") if kind == "JPEG" else image
    image.save(path, kind)
    with Image.open(path) as stored:
        assert open_image(path).tobytes() == stored.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "values",
    [
        np.array([[300, 700, 1100, 1500]], "<u2"),
        np.array([[300, 700, 1100, 1500]], ">u2"),
        np.array([[-2_000_000_000, -700_000_000, 600_000_000, 1_900_000_000]], np.int32),
        np.array([[-3.0, -1.0, 1.0, 3.0]], np.float32),
        np.array([[-3e38, -1e38, 1e38, 3e38]], np.float32),
    ],
)
@pytest.mark.parametrize("as_file", [True, False])
def test_more_than_eight_bits_are_scaled_by_their_range(tmp_path: Path, values: np.ndarray, as_file: bool) -> None:
    source: Path | np.ndarray = values
    if as_file:
        source = tmp_path / "deep.tif"
        Image.fromarray(values).save(source)
        assert values.dtype.byteorder != ">" or Image.open(source).mode == "I;16B"
    with pytest.warns(CommonNotice, match="scaled to 8 bits, each by its own range"):
        assert levels(open_image(source)) == [0, 85, 170, 255]


def test_a_constant_deep_picture_is_black() -> None:
    with pytest.warns(CommonNotice):
        assert levels(open_image(Image.new("F", (2, 2), 7.5))) == [0, 0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    path = tmp_path / "depth.tif"
    Image.fromarray(np.array([[0.0, value]], np.float32)).save(path)
    assert "not finite" in refusal(path)


def test_the_value_that_a_deep_picture_calls_transparent_is_white(tmp_path: Path) -> None:
    path = tmp_path / "depth.png"
    Image.fromarray(np.array([[0, 100, 200]], np.uint16)).save(path, transparency=0)
    with pytest.warns(CommonNotice):
        assert levels(open_image(path)) == [255, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_camera_orientation_is_applied(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # the upper left corner is white
    turns: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # how EXIF says that the upright picture is stored
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
        6: np.rot90, 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = np.ascontiguousarray(turns[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "picture"
    Image.fromarray(stored).save(path, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.abs(np.asarray(open_image(path), int) - upright).max() < 40  # JPEG


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_what_is_transparent_lies_on_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putpixel((1, 0), (0, 0, 0, 255))
    grey = image.convert("LA")
    made = {
        "RGBA": image,
        "LA": grey,
        "RGBa": image.convert("RGBa"),
        "La": grey.convert("La"),
        "PA": image.convert("PA"),
    }
    assert levels(open_image(made[mode])) == [255, 0, 255]


@pytest.mark.parametrize(("mode", "clear"), [("P", 0), ("P", b"\x00\xff"), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0)])
def test_a_transparent_colour_lies_on_white(tmp_path: Path, mode: str, clear: object) -> None:
    path = tmp_path / "clear.png"
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 0, 0) if mode in ("P", "RGB") else (255, 255, 255))
    if mode == "P":
        indexed = Image.new("P", (2, 1))
        indexed.putpalette([0, 0, 0, 255, 0, 0])
        indexed.putpixel((1, 0), 1)
        image = indexed
    image.convert(mode).save(path, transparency=clear)
    pixels = np.asarray(open_image(path))[0]
    assert pixels[0].tolist() == [255, 255, 255]
    assert pixels[1].tolist() == ([255, 0, 0] if mode in ("P", "RGB") else [255, 255, 255])


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "1"])
def test_other_colour_spaces_become_rgb(picture: MakePicture, mode: str) -> None:
    source = picture(8, 8) if mode != "LAB" else Image.new("LAB", (8, 8), (100, 128, 128))
    image = source if mode == "LAB" else source.convert(mode)
    assert open_image(image).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_is_used_and_that_is_said(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "frames"
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    red.save(path, kind, save_all=True, append_images=[blue], **({"lossless": True} if kind == "WEBP" else {}))
    with pytest.warns(CommonNotice, match="the first one is used"):
        assert open_image(path).getpixel((0, 0)) == (255, 0, 0)


def test_a_format_that_runs_other_programs_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_args: object, **_options: object) -> None:
        raise AssertionError("Ghostscript was started.")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", start)
    path = tmp_path / "picture.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    assert "not a picture" in refusal(path)
    with pytest.raises(InputError, match=r"is a EPS file\. Give a PNG"):
        open_image(Image.open(path))


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "a\0b.png", "x/" * 3000 + "a.png"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(InputError, match=r"There is no picture .*Check the path"):
        open_image(name)


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    path.write_bytes(png_that_claims(9000, 9000))  # Pillow itself would decode it
    assert "too many pixels: 9000 x 9000; up to 67 million" in refusal(path)
    with pytest.raises(InputError, match=r"too many pixels.*Scale the picture down"):
        open_image(np.broadcast_to(np.uint8(0), (9000, 9000, 3)))


def test_what_a_batch_becomes_is_bounded(picture: MakePicture, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model("demo")
    alone = loaded.family.encode(loaded.processor, [Sample(picture(64, 64), "?")]).pixels
    monkeypatch.setattr(batching, "MAX_VALUES", 2 * sum(array.size for array in alone.values()))
    three = [Sample(picture(64, 64), "?", origin=f"Line {number} of 'a'") for number in (1, 2, 3)]
    assert loaded.family.encode(loaded.processor, three[:2])
    with pytest.raises(InputError, match=r"Line 3 of 'a': The pictures of one batch .*Scale the pictures down"):
        loaded.family.encode(loaded.processor, three)


def test_arrays_and_bytes_are_pictures(picture: MakePicture) -> None:
    image = picture(5, 4)
    array, buffer = np.asarray(image), io.BytesIO()
    image.save(buffer, "PNG")
    alpha = np.concatenate((array, np.full((4, 5, 1), 255, np.uint8)), axis=2)
    for source in (array, buffer.getvalue(), array / 255, (array / 255).astype(np.float32), alpha, alpha / 255):
        assert open_image(source).tobytes() == image.tobytes()
    assert open_image(array[:, :, 0]).tobytes() == image.getchannel(0).convert("RGB").tobytes()
    assert levels(open_image(np.array([[True, False]]))) == [255, 0]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 8, 8), np.uint8), np.zeros(4, np.uint8), np.zeros((2, 2, 3), np.uint16), np.full((2, 2, 3), 1.5),
        np.full((2, 2, 3), np.nan), np.zeros((2, 2), complex), np.zeros((0, 2, 3), np.uint8), np.array([["a"]]),
    ],
)  # fmt: skip
def test_arrays_that_are_no_pictures(array: np.ndarray) -> None:
    with pytest.raises(InputError) as caught:
        open_image(array)
    assert caught.value.remedy


@pytest.mark.parametrize("image", [3, {"bytes": b""}, ["a.png", None], object()])
def test_a_sample_takes_pictures_only(image: Any) -> None:  # noqa: ANN401 - wrong on purpose
    with pytest.raises(InputError, match=r"A picture is a \w+\. Give a path, a PIL image, an array"):
        Sample(image, "what?")


def test_a_sample_says_what_is_wrong_with_its_texts() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"question": None}, "A question is None, not a text"),
        ({"question": "half \ud83d"}, "A question is not valid Unicode"),
        ({"answer": True}, "An answer is True, not a text"),
        ({"answers": "yes"}, "answers of a sample are no list"),
        ({"answers": ("yes", 1)}, "An answer is 1, not a text"),
        ({"kind": 3}, "The kind of a sample is no text"),
        ({"question": "a\0b"}, "holds a NUL character"),
        ({"marks": (1,)}, "places 1 pictures and has 0"),
        ({"image": "a.png", "marks": (9,)}, "are no places in a text of 1"),
    ]
    for fields, problem in wrong:
        with pytest.raises(InputError, match=problem) as caught:
            Sample(**{"image": None, "question": "?", **fields})
        assert caught.value.remedy
    with pytest.raises(InputError, match="There is no role 'tool'"):
        Turn("tool", "x")  # type: ignore[arg-type]


def test_a_sample_keeps_one_form() -> None:
    assert Sample("a.png", "?") == Sample([Path("a.png")], "?", marks=(0,), origin="elsewhere")
    assert Sample(["a.png", "b.png"], "?").image == (Path("a.png"), Path("b.png"))
    assert Sample([], "?").image is None
    assert Sample(None, "?", "a", answers=("b", "a")).references == ("a", "b")
    assert Sample(None, "?", answers=("b", "a")).answer == "b"


def damaged_tiff(compression: str, seed: int) -> bytes:
    rows, columns = np.mgrid[:64, :64]
    picture = Image.fromarray((rows + columns).astype(np.uint8) * 2)
    file = io.BytesIO()
    (picture.convert("1") if compression == "group4" else picture).save(file, "TIFF", compression=compression)
    data, rng = bytearray(file.getvalue()), np.random.default_rng(seed)
    at = int(rng.integers(8, len(data) - 400))
    data[at : at + 20] = rng.bytes(20)
    return bytes(data)


def test_what_libtiff_prints_is_the_reason_and_nothing_else_reaches_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    file = io.BytesIO()
    Image.new("L", (64, 64)).save(file, "TIFF", compression="tiff_adobe_deflate")
    data = bytearray(file.getvalue())
    data[12:20] = b"\xff" * 8
    with pytest.raises(InputError, match=r"damaged: ZIPDecode: Decoding error at scanline 0"):
        open_image(bytes(data))
    assert capfd.readouterr() == ("", "")


def test_a_tiff_that_libtiff_reads_in_spite_of_damage_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    said = 0
    for seed in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            open_image(damaged_tiff("group4", seed))
        said += any("may be damaged; libtiff says: Fax4Decode" in str(found.message) for found in caught)
    assert said > 3
    assert capfd.readouterr() == ("", "")


def test_a_picture_that_pillow_finds_too_large_for_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so of some damaged files, too."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")

    def load(_image: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(InputError, match="is damaged, or there is too little memory"):
        open_image(file.getvalue())
