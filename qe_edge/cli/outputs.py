"""Checks of where a command is going to write, made before any work: nothing is lost, and the disk is large enough."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import psutil

from qe_edge.system.errors import InputError, ResourceError
from qe_edge.system.ownership import is_passing, refuse_strangers

MARGIN = 1.1  # on the estimated size
NAME_BYTES = 255 - len("..12345678.part")  # what is being written has a longer name for a while
PATH_BYTES = 4096 - 400  # with room for what is written into a folder


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
    check_output_path(path)
    if path.is_dir() and any(not is_passing(found.name) for found in path.iterdir()):
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
        if renamed and overwrite:
            refuse_strangers(path)
    elif path.exists() and not path.is_dir():
        raise InputError(f"The output folder '{path}' is a file.", "Choose another name.")
    if renamed and os.path.ismount(path):
        raise InputError(f"'{path}' is a mount point, which cannot be replaced.", f"Write to '{path / 'result'}'.")
    check_writable(path if renamed or not path.is_dir() else path / "inside")


def check_output_file(path: Path, *, overwrite: bool) -> None:
    """Refuse a file that exists.

    Raises:
        InputError: If it may not be replaced, or cannot be written.
    """
    check_output_path(path)
    if path.is_dir():
        raise InputError(f"The output file '{path}' is a folder.", "Give the name of a file.")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise InputError(f"'{path}' is no plain file, and cannot be replaced.", "Give the name of a new file.")
    if path.exists() and not overwrite:
        raise InputError(f"'{path}' exists.", "Add --overwrite to replace it, or choose another name.")
    check_writable(path)


def check_output_path(path: Path) -> None:
    """Refuse an output that no file system can hold, or that is not where it seems to be.

    Raises:
        InputError: If the path has a NUL or is too long, is a link or lies below one that points nowhere, or is the
            current folder or one above it.
    """
    if "\0" in str(path):
        raise InputError(
            f"The output '{str(path).replace(chr(0), '?')}' has a NUL in its name.", "Choose another name."
        )
    whole = path.absolute()
    longest = max(whole.parts, key=lambda part: len(os.fsencode(part)))
    if len(os.fsencode(longest)) > NAME_BYTES:
        raise InputError(
            f"The name '{longest[:40]}...' has {len(os.fsencode(longest))} bytes, and {NAME_BYTES} are possible.",
            "Choose a shorter name.",
        )
    if len(os.fsencode(whole)) > PATH_BYTES:
        raise InputError(
            f"The output path has {len(os.fsencode(whole))} bytes, and {PATH_BYTES} are possible.",
            "Choose a folder nearer to the root.",
        )
    if path.is_symlink():
        raise InputError(
            f"The output '{path}' is a link to '{path.readlink()}'.", "Give the place itself, or remove the link."
        )
    broken = next((parent for parent in whole.parents if parent.is_symlink() and not parent.exists()), None)
    if broken is not None:
        raise InputError(f"'{path}' lies below '{broken}', a link that points nowhere.", "Remove the link.")
    real, here = Path(os.path.realpath(path)), Path.cwd()
    if real == here or real in here.parents:
        raise InputError(
            f"The output '{path}' is the current folder or holds it, and it cannot be replaced.",
            "Choose a new folder in it, such as 'result'.",
        )


def check_apart(output: Path, inputs: dict[str, str | Path | None], *, inside: bool = False) -> None:
    """Refuse an output that is, or lies in, a folder that the command reads.

    Args:
        output: The output.
        inputs: What the command reads, by its name in messages: folders, and names that are none.
        inside: Whether the output may lie inside.

    Raises:
        InputError: If it does.
    """
    real = Path(os.path.realpath(output))
    for name, value in inputs.items():
        if value is None or not os.path.isdir(value):  # noqa: PTH112 - which answers for any text
            continue
        read = Path(os.path.realpath(value))
        if real == read or read in (() if inside else real.parents):
            where = "is" if real == read else "lies inside"
            raise InputError(f"The output '{output}' {where} {name} '{value}'.", "Choose another folder.")


def check_apart_from_sources(output: Path, model: str, *data: str) -> None:
    """Refuse an output in the model's folder, or in the place of one that samples are read from.

    Raises:
        InputError: If it is there.
    """
    if (Path(model) / "config.json").is_file():
        check_apart(output, {"the model": model})
    for source in data:
        check_apart(output, {"the folder of samples": source}, inside=True)


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


def check_memory(needed: int) -> None:
    """Make sure that about `needed` bytes of memory are free.

    Raises:
        ResourceError: If they are not.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"Quantizing needs about {human_bytes(needed)} of memory and {human_bytes(free)} are free.",
            "Use fewer --samples, shorter texts or smaller pictures, or a machine with more memory.",
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


def human_time(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
