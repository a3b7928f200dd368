"""What survives a power cut, a rename that fails, and one that fails after it was done, as on a network folder.

A power cut loses what was not flushed. The recorder notes what every file and folder held when it was flushed, and a
rename that promises something must come after that.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from qe_edge.deploy.ledger import Ledger
from qe_edge.quantization.workfolder import WorkFolder
from qe_edge.system import atomic
from qe_edge.system.atomic import atomic_file, atomic_folder, restore
from qe_edge.system.disk_errors import REMEDIES, explain_disk
from qe_edge.system.errors import QEError, ResourceError

RUN = {"qe_edge": "1", "environment": {"threads": 2}, "model": {}, "recipe": {"seed": 0}}
EXCHANGE, RENAME, REPLACE = atomic._exchange, Path.rename, Path.replace


class Recorder:
    """What lies safely on the disk."""

    def __init__(self) -> None:
        self.flushed: dict[int, object] = {}  # by inode, which a rename keeps
        self.unsafe: list[str] = []
        self.renamed: set[Path] = set()  # folders whose entries changed since they were flushed

    def fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.flushed[path.stat().st_ino] = holds(path)
        self.renamed.discard(path)

    def promise(self, source: Path, target: Path) -> None:
        """`source` is about to stand at `target`."""
        for path in (source, *source.rglob("*")):
            if self.flushed.get(path.stat().st_ino) != holds(path):
                self.unsafe.append(f"{path} becomes {target}")
        self.renamed.add(target.parent)


def holds(path: Path) -> object:
    """Content of a file, names of a folder; temporary and lock files promise nothing."""
    if path.is_dir():
        return sorted(name for name in os.listdir(path) if not name.endswith((".part", "lock")))  # noqa: PTH208
    return path.read_bytes()


@pytest.fixture(params=["exchange", "two renames"])
def recorder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()

    def exchange(first: Path, second: Path) -> bool:
        if request.param == "two renames":
            return False
        made.promise(first, second)
        return EXCHANGE(first, second)

    def moving(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(source: Path, target: Path) -> Path:
            if atomic.OLD not in {source.name, target.name}:
                made.promise(source, target)
            return move(source, target)

        return moved

    monkeypatch.setattr(os, "fsync", made.fsync)
    monkeypatch.setattr(atomic, "_exchange", exchange)
    monkeypatch.setattr(Path, "rename", moving(RENAME))
    monkeypatch.setattr(Path, "replace", moving(REPLACE))
    yield made
    assert made.unsafe == []
    assert made.renamed == set()  # every name is flushed too


def test_the_recorder_sees_what_is_not_flushed(tmp_path: Path) -> None:
    made = Recorder()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("x", encoding="utf-8")
    made.promise(tmp_path / "a", tmp_path / "c")
    assert len(made.unsafe) == 2
    assert made.renamed == {tmp_path}


def test_files(recorder: Recorder, tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_file(tmp_path / "file") as part:
            part.write_text(text, encoding="utf-8")
    assert recorder.flushed


def test_folders(recorder: Recorder, tmp_path: Path) -> None:
    for words in ("old", "new"):
        write(tmp_path / "out", words)
    assert recorder.flushed


def test_folders_above(recorder: Recorder, tmp_path: Path) -> None:
    """A new folder is lost with its own name."""
    with atomic_file(tmp_path / "new" / "er" / "file") as part:
        part.write_text("x", encoding="utf-8")
    for folder in (tmp_path, tmp_path / "new", tmp_path / "new" / "er"):
        assert recorder.flushed[folder.stat().st_ino] == holds(folder)


def test_blocks_lie_on_the_disk_before_the_list_says_so(recorder: Recorder, tmp_path: Path) -> None:
    folder = WorkFolder.open(tmp_path / "work", RUN, resume=False)
    folder.save_offers("block", {})
    assert recorder.flushed[(tmp_path / "work" / "block.offers.json").stat().st_ino] == b"{}"
    ledger = Ledger(tmp_path / "deploy.json", {"version": "1"})
    ledger.finish("onnx", "0" * 64, [tmp_path / "work"])


NAMES = ("config.json", "words", "deep/words")
FAILURES = ("exchange", "old away", "new in place", "flush")


def broken(monkeypatch: pytest.MonkeyPatch, at: str, code: int, *, done: bool) -> None:
    """One step of replacing a folder fails: it was not done, or it was and the answer was lost, as NFS can."""
    error = OSError(code, os.strerror(code), "out")

    def exchange(first: Path, second: Path) -> bool:
        if at != "exchange":
            return False
        if done:
            EXCHANGE(first, second)
        raise error

    def rename(source: Path, target: Path) -> Path:
        if (at, source.name, target.name) in (("old away", "out", atomic.OLD), ("new in place", atomic.NEW, "out")):
            if done:
                RENAME(source, target)
            raise error
        return RENAME(source, target)

    def fsync(_descriptor: int) -> None:
        raise error

    monkeypatch.setattr(atomic, "_exchange", exchange)
    monkeypatch.setattr(Path, "rename", rename)
    if at == "flush":
        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.EXDEV, errno.EBUSY])
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("at", FAILURES)
def test_a_failure_leaves_the_old_folder_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, done: bool, code: int
) -> None:
    out = tmp_path / "out"
    write(out, "old")
    with monkeypatch.context() as patch:
        broken(patch, at, code, done=done)
        with pytest.raises((ResourceError, OSError)) as caught:
            write(out, "new")
    assert isinstance(caught.value, ResourceError) == (code in REMEDIES)
    assert (out / "words").read_text(encoding="utf-8") in ("old", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write(out, "next")
    assert (out / "words").read_text(encoding="utf-8") == "next"


def test_an_old_folder_that_cannot_return_at_once_returns_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, "old")

    def fail(source: Path, target: Path) -> Path:
        if source.name in (atomic.NEW, atomic.OLD):
            raise OSError(errno.EIO, "Input/output error", str(target))
        return RENAME(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_exchange", lambda *_paths: False)
        patch.setattr(Path, "rename", fail)
        with pytest.raises(ResourceError, match="Input/output"):
            write(out, "new")
        assert not out.exists()
        with suppress(QEError, OSError):  # the disk is still broken
            restore(out)
    restore(out)
    assert (out / "words").read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def write(out: Path, words: str) -> None:
    with atomic_folder(out) as part:
        (part / "config.json").write_text('{"quantization_config": {"quant_method": "qe-edge"}}', encoding="utf-8")
        (part / "files.json").write_text(
            json.dumps({"origin": "x", "files": {key: {"size": 1, "sha256": ""} for key in NAMES}}), encoding="utf-8"
        )
        (part / "deep").mkdir()
        (part / "deep" / "words").write_text(words, encoding="utf-8")
        (part / "words").write_text(words, encoding="utf-8")


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_a_stop_while_the_temporary_name_is_made_leaves_nothing(
    write: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes after the file exists and before anybody knows its name."""

    @contextmanager
    def stop(path: Path) -> Iterator[None]:
        with real(path):
            pass
        raise KeyboardInterrupt
        yield

    real = atomic._locked
    monkeypatch.setattr(atomic, "_locked", stop)
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "output"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_no_errors_of_a_disk() -> None:
    for error in (OSError(errno.ENOENT, "x"), ValueError("x"), OSError("no number"), BrokenPipeError(32, "x")):
        assert explain_disk(error) is None
