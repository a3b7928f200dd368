"""Reads JSON files that come from strangers: size, encoding, syntax and nesting are checked before anything is used."""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qe_edge.system.errors import ArtifactError, QEError, shown_name

MEBIBYTE = 2**20
MAX_BYTES = 16 * MEBIBYTE  # of a configuration or a manifest
MAX_DEPTH = 64  # nested tables and lists


def read_json_table(
    path: Path, *, error: type[QEError] = ArtifactError, remedy: str = "Get the file again.", limit: int = MAX_BYTES
) -> dict[str, Any]:
    """The table in a JSON file. A UTF-8 byte order mark is accepted.

    Args:
        path: The file.
        error: Class of the error for a file that cannot be used.
        remedy: Its second sentence.
        limit: Largest size in bytes.

    Raises:
        QEError: Of the class `error`, naming the file and what is wrong with it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "config.json"
        ...     _ = file.write_text('{"model_type": "llama"}')
        ...     read_json_table(file)
        {'model_type': 'llama'}
    """
    values = parse_json(read_bounded_text(path, error=error, remedy=remedy, limit=limit), path, error, remedy)
    if not isinstance(values, dict):
        raise error(f"'{path}' holds no JSON table.", remedy)
    return values


def read_bounded_text(
    path: Path, *, error: type[QEError] = ArtifactError, remedy: str = "Get the file again.", limit: int = MAX_BYTES
) -> str:
    r"""The text of a UTF-8 file, without a byte order mark. `read_bounded_bytes` describes the arguments.

    Raises:
        QEError: Of the class `error`, for a file that is missing, no regular file, too large or not UTF-8.

    Example:
        >>> _ = Path("labels.txt").write_bytes(b"\xef\xbb\xbfcat")
        >>> read_bounded_text(Path("labels.txt"))
        'cat'
    """
    data = read_bounded_bytes(path, error=error, remedy=remedy, limit=limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"'{path}' is not UTF-8: byte {problem.start} is wrong.", remedy) from problem


def read_bounded_bytes(path: Path, *, error: type[QEError], remedy: str, limit: int) -> bytes:
    """The contents of a regular file.

    Args:
        path: The file.
        error: Class of the error for a file that cannot be used.
        remedy: Its second sentence.
        limit: Largest size in bytes.

    Raises:
        QEError: Of the class `error`, for a file that is missing, no regular file or too large.

    Example:
        >>> _ = Path("large.bin").write_bytes(bytes(20))
        >>> read_bounded_bytes(Path("large.bin"), error=ArtifactError, remedy="Get the file again.", limit=10)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'large.bin' has 20 bytes; more than 10 are not read. Get the file again.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise error(f"'{path}' is not a file.", remedy)
        if found.st_size > limit:
            raise error(f"'{path}' has {found.st_size} bytes; more than {limit} are not read.", remedy)
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as problem:
        what = f"The link '{path}' points at a missing file" if path.is_symlink() else f"There is no file '{path}'"
        raise error(f"{what}.", remedy) from problem
    except (OSError, ValueError) as problem:  # ValueError: a path with a NUL
        raise error(f"'{path}' cannot be read: {problem}.", remedy) from problem
    if len(data) > limit:
        raise error(f"'{path}' has more than {limit} bytes.", remedy)
    return data


def parse_json(text: str, where: object, error: type[QEError], remedy: str, *, strict: bool = False) -> Any:  # noqa: ANN401 - any JSON value
    """The value that a JSON text describes.

    Args:
        text: The text.
        where: What it came from, for the message: a path, or a line of a file.
        error: Class of the error for a text that is not JSON.
        remedy: Its second sentence.
        strict: Whether to refuse a key that stands twice in one table, and NaN and infinity, which are not JSON.

    Raises:
        QEError: Of the class `error`, also for a text nested deeper than `MAX_DEPTH`.

    Example:
        >>> parse_json('{"a": [1, 2]}', "line 3", ArtifactError, "Mend that line.")
        {'a': [1, 2]}
        >>> parse_json('{"a": 1, "a": 2}', "line 3", ArtifactError, "Mend that line.", strict=True)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'line 3' is not valid JSON: the key 'a' stands twice. Mend that line.
    """
    try:
        if strict:
            values = json.loads(text, object_pairs_hook=_table, parse_constant=_refuse_constant)
        else:
            values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        reason = "it is nested too deeply" if isinstance(problem, RecursionError) else str(problem)
        raise error(f"'{where}' is not valid JSON: {reason}.", remedy) from problem
    if _deeper_than(values, MAX_DEPTH):
        raise error(f"'{where}' is nested deeper than {MAX_DEPTH} levels.", remedy)
    return values


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError(f"the key '{shown_name(_first_twice(name for name, _ in pairs))}' stands twice")
    return table


def _first_twice(names: Iterable[str]) -> str:
    return next(name for name, count in Counter(names).items() if count > 1)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _deeper_than(values: object, limit: int) -> bool:
    level = [values]
    for _ in range(limit):
        level = [child for value in level for child in _children(value) if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
