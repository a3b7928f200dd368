"""Safetensors files that are none, or whose header lies, are refused before a tensor is read."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.system.errors import ArtifactError

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: object, data: bytes = bytes(8)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ArtifactError) as error:
        check_safetensors(path)
    assert error.value.remedy
    assert len(error.value.problem) < 500
    return error.value.problem


def test_a_sound_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"__metadata__": {"format": "pt"}, "a": ENTRY})
    assert check_safetensors(path) == {"a": ("F32", (2,))}


@pytest.mark.parametrize("place", ["pipe", "folder", "missing", "dangling", "device", "loop"])
def test_what_is_no_file_is_not_opened(place: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    match place:
        case "pipe":
            os.mkfifo(path)  # opening it would wait for ever
        case "folder":
            path.mkdir()
        case "dangling":
            path.symlink_to("nothing")
        case "device":
            path.symlink_to("/dev/full")
        case "loop":
            path.symlink_to(path)
    problem = refusal(path)
    assert "is not a file" in problem or "cannot be read" in problem


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": {**ENTRY, "shape": [2**63, 0]}}, "no valid shape"),
        ({"a": {**ENTRY, "shape": [1] * 99 + [2]}}, "no valid shape"),
        ({"a": {**ENTRY, "shape": [2.0]}}, "no valid shape"),
        ({"x" * 5000: {**ENTRY, "shape": [3]}}, "does not fill"),
        ({"a": {**ENTRY, "dtype": "Q" * 5000}}, "does not know"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}', "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
        (b"[" * 3000, "not JSON"),
        ({"__metadata__": {"format": 5}, "a": ENTRY}, "cannot be read by safetensors"),
    ],
)
def test_headers_that_lie(header: object, said: str, tmp_path: Path) -> None:
    assert said in refusal(write(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("content", [None, "", "[]", '{"quantization_config": [1]}', "[" * 5000])
def test_what_is_no_checkpoint(content: str | None, tmp_path: Path) -> None:
    if content is None:
        os.mkfifo(tmp_path / "config.json")
    else:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path)
