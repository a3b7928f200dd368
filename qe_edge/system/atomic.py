"""Writing files and folders under a temporary name and renaming them when they are complete and on the disk.

Temporary names beside the output, `.NAME.RANDOM.part`, cannot be guessed, and links are never opened. A lock tells
other processes whether somebody still writes there. The next process removes what a killed one has left, and puts back
an old folder that the killed one had moved away.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qe_edge.system.disk_errors import disk_explained
from qe_edge.system.errors import InputError
from qe_edge.system.folders import parents_of, sync_file, sync_folder, sync_tree
from qe_edge.system.locks import lock_file
from qe_edge.system.ownership import refuse_strangers, strangers

PART = ".part"
LOCK, NEW, OLD = ".qe-edge-lock", "new", "old"  # inside the folder
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; it becomes `path` if the block succeeds and vanishes if it does not.

    A link at `path` is replaced and never followed.

    Raises:
        InputError: If `path` names no file, or is a folder.
        ResourceError: If the disk is full, or the system reports another failure of it.

    Example:
        >>> with atomic_file(Path("report.json")) as part:
        ...     print(Path("report.json").exists(), part.write_text("{}"))
        False 2
        >>> Path("report.json").read_text()
        '{}'
    """
    if path.is_dir() and not path.is_symlink():
        raise InputError(f"'{path}' is a folder, and is to be a file.", "Choose another name, or rename the folder.")
    with _prepared(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        with _locked(temporary):
            try:
                yield temporary
                _readable(temporary)
                sync_file(temporary)
                temporary.replace(path)
                sync_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block succeeds.

    An older folder is replaced if QE-Edge wrote all that it holds. What others put there while the block runs is kept.

    Raises:
        InputError: If `path` is a link or a file, or holds files that QE-Edge did not write.
        ResourceError: If the disk is full, or the system reports another failure of it.

    Example:
        >>> with atomic_folder(Path("out/engines")) as part:
        ...     _ = (part / "manifest.json").write_text("{}")
        >>> [path.as_posix() for path in Path("out/engines").iterdir()]
        ['out/engines/manifest.json']
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise InputError(f"'{path}' is a link or a file, and is to be a folder.", "Choose another folder.")
    restore(path)
    refuse_strangers(path)
    with _staged(path) as part:
        temporary = part / NEW
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _readable(file)
        sync_tree(temporary)
        replaced = _take_place(temporary, path, part / OLD)
        if replaced is not None:
            for name in strangers(replaced):
                if not os.path.lexists(path / name):
                    (path / name).parent.mkdir(parents=True, exist_ok=True)
                    (replaced / name).rename(path / name)
        sync_folder(path.parent)


def restore(path: Path) -> None:
    """Remove what killed processes left beside `path`, and put back a folder that one had moved away from `path`.

    Example:
        >>> left = Path(".report.json.a1b2c3d4.part")
        >>> _ = left.write_text("half a report of a killed process")
        >>> restore(Path("report.json"))
        >>> left.exists()
        False
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}{re.escape(PART)}", re.DOTALL)
    for left in path.parent.iterdir() if path.parent.is_dir() else ():
        if name.fullmatch(left.name) is None or left.is_symlink():
            continue
        lock_at = left / LOCK if left.is_dir() else left
        if not lock_at.is_file():
            continue  # not ours, or just being made
        try:
            lock = lock_file(lock_at)
        except OSError:
            continue  # of another user, or a file system without locks: nobody knows whether it is in use
        if lock is not None:
            try:
                _remove(left, path)
            finally:
                os.close(lock)


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A locked folder beside `path` that only its owner can read; it vanishes with all that is left in it."""
    with _prepared(path):
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
        with _locked(part / LOCK):
            try:
                yield part
            finally:
                _remove(part, path)


@contextmanager
def _prepared(path: Path) -> Iterator[None]:
    """The folders above `path` exist, nothing of killed processes is left, and failures of the disk are explained."""
    if path.name in ("", ".."):
        raise InputError(f"'{path}' names no output.", "Give the name of a new file or folder.")
    with parents_of(path), disk_explained(path):
        restore(path)
        try:
            yield
        except BaseException:  # a stop may come between making a temporary name and what would remove it
            restore(path)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock on a temporary file, where the file system knows locks; elsewhere nobody removes what others have left."""
    lock = None
    with suppress(OSError):
        lock = lock_file(path)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _remove(part: Path, path: Path) -> None:
    """Remove what is left of writing `path`."""
    if part.is_dir():
        _put_back(part / OLD, path)
        shutil.rmtree(part, ignore_errors=True)
    else:
        part.unlink(missing_ok=True)


def _take_place(new: Path, path: Path, old: Path) -> Path | None:
    """Rename `new` to `path`; returns where the folder that was there lies now."""
    if not path.exists():
        new.rename(path)
        return None
    if _exchange(new, path):
        return new
    path.rename(old)  # a failure between the two renames, of whatever kind, ends in `_put_back`
    new.rename(path)
    return old


def _put_back(old: Path, path: Path) -> None:
    """An old folder returns to its place where no new one has taken it."""
    if old.is_dir() and not os.path.lexists(path):
        old.rename(path)


def _exchange(first: Path, second: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot do that.

    Raises:
        OSError: If the renaming itself fails.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28 and later
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _readable(path: Path) -> None:
    """Give a file the mode that any new file has; safetensors writes files that only their owner can read."""
    if stat.S_ISREG(path.lstat().st_mode):
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
