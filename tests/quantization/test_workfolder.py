"""A folder that lies where an unfinished run had a file, or where a file is to be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.system.atomic import atomic_file
from qe_edge.system.errors import ArtifactError, InputError

RUN = {"qe_edge": "1", "model": {}, "recipe": {}, "environment": {}}


def begin(path: Path) -> None:
    folder = WorkFolder.open(path, RUN, resume=False)
    for name in ("a.safetensors", "b.safetensors"):
        folder.expect(name)
        (path / name).write_bytes(b"1")
        folder.wrote(name)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine.txt").touch()


def test_resuming_says_what_is_in_the_way(tmp_path: Path) -> None:
    begin(tmp_path / "work")
    replace_by_folder(tmp_path / "work" / "b.safetensors")
    with pytest.raises(ArtifactError, match=r"'.*b\.safetensors' is a folder, where the unfinished run") as error:
        WorkFolder.open(tmp_path / "work", RUN, resume=True)
    assert "Rename it" in error.value.remedy
    assert (tmp_path / "work" / "a.safetensors").is_file()


def test_discarding_keeps_a_folder_of_others(tmp_path: Path) -> None:
    begin(tmp_path / "work")
    replace_by_folder(tmp_path / "work" / "b.safetensors")
    WorkFolder.discard(tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").rglob("*")] == ["b.safetensors", "mine.txt"]


def test_no_file_is_written_over_a_folder(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with (
        pytest.raises(InputError, match=r"report\.json' is a folder, and is to be a file"),
        atomic_file(tmp_path / "report.json"),
    ):
        pytest.fail("nothing is computed for it")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_record_that_differs_in_everything_is_said_in_a_sentence(tmp_path: Path) -> None:
    others = {"qe_edge": "1" * 5000, "model": {"x" * 5000: "1"}, "recipe": {f"key {n}": "v" * 999 for n in range(99)}}
    WorkFolder.open(tmp_path / "work", {**RUN, **others}, resume=False)
    with pytest.raises(ArtifactError, match=r"and 98 more") as error:
        WorkFolder.open(tmp_path / "work", RUN, resume=True)
    assert len(error.value.problem) < 900


def test_an_environment_that_is_damaged_is_said_in_a_sentence(tmp_path: Path) -> None:
    record = {**RUN, "environment": {"threads": "1" * 9000, "device": [["x" * 9000]]}}
    WorkFolder.open(tmp_path / "work", record, resume=False)
    with pytest.raises(ArtifactError, match="made in another environment") as error:
        WorkFolder.open(tmp_path / "work", {**RUN, "environment": {"threads": 2, "device": "cpu"}}, resume=True)
    assert len(error.value.problem) < 900
