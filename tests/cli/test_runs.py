"""Locks, changed inputs, others' files, and power cuts: what a run refuses and what it repairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qe_edge.cli.outputs import check_apart, check_output_file, check_output_path
from qe_edge.models.fingerprints import model_parts
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.system import atomic
from qe_edge.system.atomic import atomic_file, atomic_folder, restore
from qe_edge.system.digests import file_digest
from qe_edge.system.errors import ArtifactError, InputError, NumericalError, QENotice, ResourceError
from qe_edge.system.locks import hold

RUN = {
    "qe_edge": "1",
    "environment": {"threads": 2, "torch": "2"},
    "model": {"model.safetensors": "a"},
    "recipe": {"seed": 0, "calibration": {"sha256": "x"}},
}


def test_a_second_run_names_folder_and_process_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with hold(out):
        with pytest.raises(ResourceError, match=rf"process {os.getpid()} .*'{out}'") as refused, hold(out):
            pass
        assert "Wait" in refused.value.remedy
    assert list(out.parent.iterdir()) == []
    (out.parent / ".out.lock").write_text('{"process": 1}')  # of a process that was killed: the number decides nothing
    with hold(out):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="cannot be made"), hold(tmp_path / "out"):
        pass
    assert not (tmp_path / "secret").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"model.safetensors": "b"}}, "weights: 'model.safetensors' changed"),
        ({"model": {"model.safetensors": "a", "chat_template.jinja": "c"}}, "chat template: .* is new"),
        ({"recipe": {"seed": 7, "calibration": {"sha256": "x"}}}, "'seed' was 0 and is 7"),
        ({"recipe": {"seed": 0, "calibration": {"sha256": "y"}}}, "the calibration data changed"),
        ({"qe_edge": "2"}, "QE-Edge 1 became 2"),
        ({"environment": {"threads": 4, "torch": "2"}}, "threads: 2 then, 4 now"),
    ],
)
def test_resume_says_what_changed(tmp_path: Path, change: dict[str, object], words: str) -> None:
    WorkFolder.open(tmp_path / "work", RUN, resume=False)
    WorkFolder.open(tmp_path / "work", RUN, resume=True)
    with pytest.raises(ArtifactError, match=words) as refused:
        WorkFolder.open(tmp_path / "work", {**RUN, **change}, resume=True)
    assert "--overwrite" in refused.value.remedy


def test_a_changed_file_of_a_run_is_made_again_and_said(tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", RUN, resume=False)
    folder.save_offers("block", {})
    again = WorkFolder.open(tmp_path / "work", RUN, resume=True)
    assert again.load_offers("block") == {}
    (tmp_path / "work" / "block.offers.json").write_bytes(b"")
    with pytest.warns(QENotice, match="computed again"):
        assert again.load_offers("block") is None


def test_a_run_that_failed_on_its_data_blocks_nothing_and_keeps_others_files(tmp_path: Path) -> None:
    work = tmp_path / "work"

    def failing() -> None:
        with WorkFolder.open(work, RUN, resume=False).removed_if_useless() as begun:
            begun.save_offers("block", {})
            raise NumericalError("a", "b")

    with pytest.raises(NumericalError):
        failing()
    assert not work.exists()
    folder = WorkFolder.open(work, RUN, resume=False)
    (work / "notes.txt").write_text("mine")
    folder.remove()
    assert [path.name for path in work.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match=r"notes\.txt"):
        WorkFolder.open(work, RUN, resume=False)


def test_a_folder_of_others_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match=r"thesis\.tex' was not written by QE-Edge"), atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("exchange", [True, False])
def test_what_others_put_into_a_folder_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_paths: False)
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as part:
        (part / "config.json").write_text("{}")
        (out / "late.txt").write_text("mine")
    assert {path.name for path in out.iterdir()} == {"config.json", "late.txt"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()

    def failing(path: Path, target: Path) -> Path:
        if path.name == atomic.NEW:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(atomic, "_exchange", lambda *_paths: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ResourceError, match=r"'Input/output error' for"), atomic_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_a_killed_process_moved_away_returns(tmp_path: Path) -> None:
    left = tmp_path / ".out.abcd1234.part"
    (left / atomic.OLD).mkdir(parents=True)
    (left / atomic.OLD / "kept").write_text("x")
    (left / atomic.LOCK).write_text("")
    (tmp_path / ".out.zzzz9999.part").write_text("half")
    restore(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "kept").exists()


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "x") as first:
        first.write_text("first")
        with atomic_file(tmp_path / "x") as second:
            second.write_text("second")
        assert first.name != second.name
    assert (tmp_path / "x").read_text() == "first"


def test_outputs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, target in (("dangling", "gone"), ("loop", "loop"), ("folder", ".")):
        Path(name).symlink_to(target)
        with pytest.raises(InputError, match="is a link to"):
            check_output_path(Path(name))
    for name, words in (
        (".", "current folder"), ("..", "current folder"), ("/", "current folder"), ("a\0b", "NUL"),
        ("ü" * 125, "250 bytes"), ("a/" * 2000 + "b", "4"), ("dangling/x", "points nowhere"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            check_output_path(Path(name))
    os.mkfifo("pipe")
    with pytest.raises(InputError, match="no plain file"):
        check_output_file(Path("pipe"), overwrite=True)
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="lies inside the model"):
        check_apart(tmp_path / "model" / "out", {"the model": "model"})


def test_the_last_weight_of_a_model_counts(model: Path) -> None:
    before, weights = model_parts(str(model)), model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = model_parts(str(model))
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    assert file_digest(weights).size == len(data)
