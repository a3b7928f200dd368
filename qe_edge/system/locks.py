"""One run at a time on an output: locks that the kernel releases however a process ends.

A lock is a file beside the output. Who holds it is decided by `flock` alone; the process number in the file is only
shown, since numbers repeat in containers.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from qe_edge.system.errors import InputError, QEError, QENotice, ResourceError
from qe_edge.system.folders import parents_of
from qe_edge.system.json_files import parse_json

SUFFIX = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
MAX_BYTES = 1000  # of what a lock file says about its holder


def lock_path(target: Path) -> Path:
    """The lock file of an output, a hidden file beside it.

    Example:
        >>> lock_path(Path("out/checkpoint")).as_posix()
        'out/.checkpoint.lock'
    """
    return target.with_name(f".{target.name}{SUFFIX}")


@contextmanager
def hold(target: Path, shown: Path | None = None) -> Iterator[None]:
    """No other process writes to an output while the context is open.

    Where the file system knows no locks, the user is told so and nothing is locked.

    Args:
        target: The output; its lock file lies beside it and vanishes at the end.
        shown: What messages call it; None for `target`.

    Raises:
        ResourceError: If another run writes there; it is raised at once.
        InputError: If the lock file cannot be made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, hold(Path(folder) / "out"):
        ...     print([path.name for path in Path(folder).iterdir()])
        ['.out.lock']
    """
    path, shown = lock_path(target), shown or target
    with parents_of(target):
        try:
            descriptor = lock_file(path)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise InputError(
                    f"The lock '{path}' cannot be made: {error.strerror}.",
                    "Remove what lies there, or choose another output.",
                ) from error
            warnings.warn(
                f"The file system of '{shown}' knows no locks; see that no second run writes there.",
                QENotice,
                stacklevel=3,
            )
            yield
            return
        if descriptor is None:
            raise ResourceError(
                f"Another run{_holder(path)} writes to '{shown}'.",
                "Wait until it has ended, stop it, or choose another output.",
            )
        try:
            _sign(descriptor)
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: whoever waits for this file sees that it is gone
            os.close(descriptor)


def lock_file(path: Path) -> int | None:
    """Make and lock a file; closing the descriptor releases it.

    Returns:
        The descriptor, or None if another process holds the lock.

    Raises:
        OSError: If there is something else than a plain file, or the file system knows no locks.

    Example:
        >>> first = lock_file(Path(".out.lock"))
        >>> second = lock_file(Path(".out.lock"))  # somebody holds it
        >>> os.close(first)
        >>> second is None
        True
    """
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
        try:
            _check_plain(path, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder has removed it meanwhile


def _check_plain(path: Path, descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise FileExistsError(errno.EEXIST, "something else than a file lies there", str(path))


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock, for the message of another run."""
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    text = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": since})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _holder(path: Path) -> str:
    """What a lock file says of its holder, in brackets; nothing if it says nothing."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            text = os.read(descriptor, MAX_BYTES).decode()
        finally:
            os.close(descriptor)
        found = parse_json(text, path, InputError, "")
    except (OSError, ValueError, QEError):
        return ""
    if not isinstance(found, dict) or not isinstance(found.get("process"), int):
        return ""
    return f" (process {found['process']} on '{found.get('host')}', since {found.get('since')})"
