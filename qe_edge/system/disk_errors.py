"""What a disk or a network folder reports, as an error with a remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qe_edge.system.errors import ResourceError, printable

FULL = (errno.ENOSPC, errno.EDQUOT)
AGAIN = "Check the disk or the network folder, then run the same command again."
REMEDIES = {
    errno.EIO: AGAIN,
    errno.EREMOTEIO: AGAIN,
    errno.ESTALE: AGAIN,
    errno.EUCLEAN: AGAIN,
    errno.EROFS: "Make it writable again, or choose an output on another disk.",
    errno.EXDEV: "Move the old folder away, or choose another output: this file system cannot rename it.",
    errno.ENOTEMPTY: "Something else writes there. Let it end, then run the same command again.",
    errno.EBUSY: "Something else uses it. Let it end, then run the same command again.",
    errno.EMFILE: "Allow more with 'ulimit -n 4096', then run the same command again.",
    errno.ENFILE: "Close other programs, then run the same command again.",
}


@contextmanager
def disk_explained(path: Path) -> Iterator[None]:
    """Turn what the system reports while `path` is written into an error with a remedy, whatever library met it.

    Raises:
        ResourceError: For a full disk, and for what `explain_disk` knows.

    Example:
        >>> with disk_explained(Path("out")):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ResourceError: The disk is full; 'out' could not be written. Free some space or
        choose another output folder.
    """
    try:
        yield
    except Exception as error:  # libraries wrap a full disk in types of their own; anything else goes on
        if _is_full(error):
            raise ResourceError(
                f"The disk is full; '{path}' could not be written.", "Free some space or choose another output folder."
            ) from error
        explained = explain_disk(error, path)
        if explained is not None:
            raise explained from error
        raise


def explain_disk(error: Exception, path: Path | None = None) -> ResourceError | None:
    """What the system reports about a disk, in two sentences; None for any other error.

    Args:
        error: What was raised.
        path: What was being written, for an error that names no file.

    Example:
        >>> print(explain_disk(OSError(5, "Input/output error", "out")))
        The system reports 'Input/output error' for 'out'. Check the disk or the network folder, then run the same \
command again.
    """
    if not isinstance(error, OSError) or error.errno not in REMEDIES:
        return None
    name = error.filename2 or error.filename or path
    where = f" for '{printable(os.fsdecode(name))}'" if isinstance(name, str | bytes | Path) else ""
    return ResourceError(f"The system reports '{os.strerror(error.errno)}'{where}.", REMEDIES[error.errno])


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(os.strerror(code) in str(error) for code in FULL)
