"""Writing files and folders under a temporary name and renaming them when they are complete."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from qe_edge.errors import ResourceError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` if the block succeeds and vanishes if it does not.

    Raises:
        ResourceError: If the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _parent_of(path), no_space_explained(path):
        _remove_stale(path)
        try:
            yield temporary
            _readable(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that replaces `path` when the block succeeds.

    Raises:
        ResourceError: If the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with _parent_of(path), no_space_explained(path):
        _remove_stale(path)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.rglob("*"):
                _readable(file)
            if path.exists():
                path.replace(old)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _parent_of(path: Path) -> Iterator[None]:
    """The folders above `path` exist inside the context; those made for it vanish if it fails and leaves them empty."""
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


@contextmanager
def no_space_explained(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error with a remedy, whatever library met it."""
    try:
        yield
    except Exception as error:  # libraries wrap ENOSPC in types of their own; anything else goes on
        if _is_no_space(error):
            raise ResourceError(
                f"The disk is full; '{path}' could not be written.", "Free some space or choose another output folder."
            ) from error
        raise


def _readable(path: Path) -> None:
    """Give a file the mode that any new file has; safetensors writes files that only their owner can read."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)


def _is_no_space(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return any(os.strerror(code) in str(error) for code in codes)


def _remove_stale(path: Path) -> None:
    """Delete temporary files that a killed process left beside `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        owner, _, kind = left.name.removeprefix(f".{path.name}.").partition(".")
        if kind in ("part", "old") and owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
