"""Folders around an output: those above it, made for it alone, and getting what they hold onto the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP)  # file systems that cannot flush a folder


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """The folders above `path` exist inside the context; those made for it vanish if it fails and leaves them empty."""
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync_folder(folder.parent)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()
        raise


def sync_tree(folder: Path) -> None:
    """Flush all files below a folder, then the folders, so that a power cut after this loses none of them."""
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(place) / name).is_symlink():
                sync_file(Path(place) / name)
        sync_folder(Path(place))


def sync_file(path: Path) -> None:
    """Flush a file's content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush which names a folder holds, where its file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # or a link to one
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
