"""Makes the folders above an output, and flushes files and folders to the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_SYNC = (errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP)  # file systems that cannot flush a folder


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path` for the context; if it fails, the new ones that are still empty are removed.

    Example:
        >>> with parents_of(Path("new/inner/file")):
        ...     print(Path("new/inner").is_dir())
        True
    """
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
    """Flush all files below a folder, then the folders, so that a power cut after this loses none of them.

    Example:
        >>> Path("kept").mkdir()
        >>> _ = Path("kept/a.txt").write_text("abc")
        >>> sync_tree(Path("kept"))  # a power cut loses nothing of it now
    """
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not (Path(place) / name).is_symlink():
                sync_file(Path(place) / name)
        sync_folder(Path(place))


def sync_file(path: Path) -> None:
    """Flush a file's content.

    Example:
        >>> _ = Path("a.txt").write_text("abc")
        >>> sync_file(Path("a.txt"))
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, where its file system can do that.

    Example:
        >>> sync_folder(Path())  # after a file in it was renamed
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # or a link to one
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
