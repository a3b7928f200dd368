"""A folder that is damaged, changed, or of another version is refused before anything of it is used."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def edit(folder: Path, key: str, value: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def edit_and_seal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    table = json.loads(path.read_text())
    del table["digest"]
    change(table)
    content = json.dumps(table, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps(table | {"digest": hashlib.sha256(content.encode()).hexdigest()}))


def leave_out(folder: Path, name: str) -> None:
    edit_and_seal(folder, lambda table: table["files"].pop(name))


def penalize(folder: Path, value: float) -> None:
    edit_and_seal(folder, lambda table: table["generation"].update(repetition_penalty=value))


def label(folder: Path, digits: list[int]) -> None:
    said = {"before": [], "digits": digits, "after": []}
    edit_and_seal(folder, lambda table: table["picture"].update(label=said))


def take_outputs(folder: Path) -> None:
    edit_and_seal(folder, lambda table: table["graphs"]["language"].update(outputs=[]))


def flip(folder: Path) -> None:
    path = folder / "language.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "embedding.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def link_outside(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere.json"
    shutil.move(folder / "tokenizer.json", elsewhere)
    (folder / "tokenizer.json").symlink_to(elsewhere)


CASES: list[tuple[Callable[[Path], object], str]] = [
    (flip, "its SHA-256 is not the one that was written"),
    (cut, "bytes and was written with"),
    (link_outside, "is a link that points outside"),
    (lambda folder: (folder / "visual.onnx").unlink(), "'visual.onnx' is missing"),
    (lambda folder: (folder / "tokenizer.model").write_bytes(b"x"), "was added after the folder was written"),
    (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "is not valid JSON"),
    (lambda folder: leave_out(folder, "chat.json"), "manifest.json lists no file 'chat.json'"),
    (lambda folder: penalize(folder, 1e-50), "repetition_penalty is 0.000000"),
    (lambda folder: label(folder, [1] * 9), "numbered without ten digits"),
    (lambda folder: label(folder, [10**6] * 10), "names token 1000000 of a vocabulary"),
    (take_outputs, "'language.onnx' has no inputs or no outputs"),
    (lambda folder: edit(folder, "hidden_size", 128), "was changed after it was written"),
    (lambda folder: edit(folder, "format_version", 99), "has another format version than 3"),
]


@pytest.mark.parametrize(("damage", "said"), CASES, ids=[said for _, said in CASES])
def test_damage_is_said(
    damage: Callable[[Path], object], said: str, build: Path, folder: Path, onnxruntime: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    damage(copy)
    done = subprocess.run([build / "tests/answer", copy, onnxruntime], input=b"", capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()[-2000:]
    assert said in done.stderr.decode()


@pytest.mark.parametrize("library", ["/nonexistent/libonnxruntime.so", "libc.so.6"])
def test_a_library_that_is_no_onnxruntime_is_said(library: str, build: Path, folder: Path) -> None:
    done = subprocess.run([build / "tests/answer", folder, library], input=b"", capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()[-2000:]
    assert "1.21 or later" in done.stderr.decode()


def test_a_folder_that_cannot_be_read_is_said(build: Path, onnxruntime: Path, tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 300)  # longer than a name may be
    done = subprocess.run([build / "tests/answer", folder, onnxruntime], input=b"", capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()[-2000:]
    assert "cannot be read: File name too long." in done.stderr.decode()
