"""Writing files and folders under a temporary name and renaming them when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qe_edge.errors import ResourceError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` if the block succeeds and vanishes if it does not.

    Raises:
        ResourceError: If the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with no_space_explained(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that replaces `path` when the block succeeds.

    Raises:
        ResourceError: If the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with no_space_explained(path):
            temporary.mkdir()
            yield temporary
            if path.exists():
                os.replace(path, old)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def no_space_explained(path: Path) -> Iterator[None]:
    """Turn "no space left" into an error with a remedy, whatever library met it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - libraries wrap ENOSPC in types of their own; anything else goes on
        if _is_no_space(error):
            raise ResourceError(
                f"The disk is full; '{path}' could not be written.", "Free some space or choose another output folder."
            ) from error
        raise


def _is_no_space(error: BaseException) -> bool:
    import errno

    return (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left on device" in str(error)
