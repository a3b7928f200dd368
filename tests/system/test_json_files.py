"""What strangers' JSON files may do to us: nothing but a sentence."""

import os
from pathlib import Path

import pytest

from qe_edge.system.errors import ArtifactError, ModelError
from qe_edge.system.json_files import MAX_DEPTH, read_json_table


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "no JSON table"),
        (b"caf\xe9", "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'{"a": ' * 5000 + b"1" + b"}" * 5000, "nested"),
        (b'{"a": ' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1), "nested deeper"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=words) as caught:
        read_json_table(path, error=ModelError, remedy="Download it again.")
    assert str(path) in caught.value.problem
    assert caught.value.remedy == "Download it again."


def test_missing_dangling_special_and_large_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no file"):
        read_json_table(tmp_path / "missing.json")
    (tmp_path / "link.json").symlink_to("nowhere")
    with pytest.raises(ArtifactError, match="points at a missing file"):
        read_json_table(tmp_path / "link.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ArtifactError, match="not a file"):
        read_json_table(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_text('{"a": 1}')
    with pytest.raises(ArtifactError, match="8 bytes"):
        read_json_table(tmp_path / "large.json", limit=7)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json_table(tmp_path / "nul\0.json")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_table(path) == {"a": 1}
