"""Folders of pictures: captions, files that are no data, and links that leave the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from qe_edge.calibration.sources import check_reached, load_samples
from qe_edge.models.samples import Sample
from qe_edge.system.errors import CalibrationError, QENotice


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder "data" with two captioned pictures, and a neighbour that is none of its business."""
    for name in ("data/a.png", "data/below/b.TIF", "elsewhere/c.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
        path.with_suffix(".txt").write_text(f"caption of {path.stem}\n", encoding="utf-8")
    return tmp_path / "data"


def captions(source: Path) -> list[str | None]:
    return [sample.answer for sample in load_samples(str(source))]


def test_pictures_with_captions(folder: Path, tmp_path: Path) -> None:
    assert captions(folder) == ["caption of a", "caption of b"]
    (tmp_path / "link").symlink_to(folder)
    assert captions(tmp_path / "link") == ["caption of a", "caption of b"]


def test_hidden_files_are_no_data(folder: Path) -> None:
    for name in (
        "._a.png",
        ".hidden.png",
        "__MACOSX/._b.png",
        ".thumbnails/a.png",
        "Thumbs.db",
        "._x.jsonl",
        "._a.txt",
    ):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x00\x05\x16\x07")
    assert captions(folder) == ["caption of a", "caption of b"]


def test_formats_that_are_not_read_are_said(folder: Path) -> None:
    (folder / "d.HEIC").touch()
    with pytest.warns(QENotice, match=r"1 files of .* for example 'd.HEIC'; convert them to PNG or JPEG"):
        assert len(captions(folder)) == 2


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("x.png", "elsewhere/c.png"), ("a.txt", "elsewhere/c.txt"), ("deep", "elsewhere"),
        ("x.jsonl", "elsewhere/c.txt"), ("round.png", "data/round.png"),
    ],
)  # fmt: skip
def test_links_that_leave_the_folder(folder: Path, tmp_path: Path, link: str, target: str) -> None:
    (folder / link).unlink(missing_ok=True)
    (folder / link).symlink_to(tmp_path / target)
    with pytest.raises(CalibrationError, match=rf"The link '.*{link}' points outside .*Copy what it points at"):
        captions(folder)


def test_links_inside_the_folder(folder: Path) -> None:
    (folder / "x.png").symlink_to("below/b.TIF")
    (folder / "y").symlink_to("below")
    assert captions(folder) == ["caption of a", "caption of b", None]


@pytest.mark.parametrize("data", [b"un caf\xe9", "où".encode("utf-16"), b"a\0b", b"x" * (1 << 20) + b"x"])
def test_captions_that_are_no_text(folder: Path, data: bytes) -> None:
    (folder / "a.txt").write_bytes(data)
    with pytest.raises(CalibrationError, match=r"'.*a\.txt'") as caught:
        captions(folder)
    assert caught.value.remedy


@pytest.mark.parametrize("source", ["x" * 300, "a\0b", "data:image/png;base64," + "A" * 9000, "half \udc80"])
def test_sources_that_are_no_path(source: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        load_samples(source)
    assert len(caught.value.problem) < 300
    assert caught.value.remedy


def test_data_without_pictures_reach_no_vision_module() -> None:
    text = [Sample(None, "?")]
    check_reached(text, ["language"])
    check_reached([*text, Sample("a.png", "?")], ["visual", "language"])
    for module in ("visual", "merger"):
        with pytest.raises(CalibrationError, match=rf"no data reaches '{module}'.*--modules language"):
            check_reached(text, ["language", module])
