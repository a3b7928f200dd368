"""Checks of where a command is going to write, made before any work: nothing is lost, and the disk is large enough."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from qe_edge.errors import InputError, ResourceError

MARGIN = 1.1  # on the estimated size


def check_output_folder(
    path: Path,
    is_ours: Callable[[Path], bool],
    *,
    overwrite: bool,
    resume: bool | None = None,
    renamed: bool = True,
) -> None:
    """Refuse a folder that is in use.

    Args:
        path: The output folder.
        is_ours: Whether a folder holds what this command writes; nothing else is ever replaced.
        overwrite: Whether the user allows to replace it.
        resume: Whether the user wants to continue an earlier run; None where that is not possible.

        renamed: Whether the folder as a whole takes the place of an older one (or files are only put into it).

    Raises:
        InputError: If it holds anything that may not be replaced, or cannot be written.
    """
    if path.is_dir() and any(path.iterdir()):
        if not overwrite and not resume:
            choices = (
                "--overwrite to replace it" if resume is None else "--overwrite to replace it, --resume to continue"
            )
            raise InputError(f"The output folder '{path}' is not empty.", f"Add {choices}, or choose another folder.")
        if not is_ours(path):
            raise InputError(
                f"'{path}' holds files that this command did not write, and it does not replace those.",
                "Choose another folder.",
            )
    elif path.exists() and not path.is_dir():
        raise InputError(f"The output folder '{path}' is a file.", "Choose another name.")
    if renamed and os.path.ismount(path):
        raise InputError(f"'{path}' is a mount point, which cannot be replaced.", f"Write to '{path / 'result'}'.")
    check_writable(path)


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that exists.

    Raises:
        InputError: If it may not be replaced, or cannot be written.
    """
    if path.is_dir():
        raise InputError(f"The output file '{path}' is a folder.", "Give the name of a file.")
    if path.exists() and not overwrite:
        raise InputError(f"'{path}' exists.", "Add --overwrite to replace it, or choose another name.")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Make sure that `path` can be created: the nearest existing parent is a folder that may be written.

    Raises:
        InputError: If it is not.
    """
    parent = existing_parent(path)
    if not parent.is_dir():
        raise InputError(f"'{path}' cannot be created, since '{parent}' is a file.", "Choose another name.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"'{path}' cannot be created: '{parent}' is not writable.", "Choose another folder.")


def check_disk(path: Path, needed: int) -> None:
    """Make sure that about `needed` bytes fit on the disk that holds `path`.

    Raises:
        ResourceError: If they do not.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if needed * MARGIN > free:
        raise ResourceError(
            f"'{path}' needs about {human_bytes(needed * MARGIN)} of disk and {human_bytes(free)} are free.",
            "Free some space or choose a folder on another disk.",
        )


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def existing_parent(path: Path) -> Path:
    """The nearest parent that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def human_bytes(size: float) -> str:
    """A size in KiB, MiB or GiB."""
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} GiB"
