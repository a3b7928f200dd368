"""Size and SHA-256 of every file of a folder that we write, and comparing them when the folder is opened.

Hashing streams every file once and costs about half a second for a gigabyte (2 GB/s on one core) if the disk keeps up.
Sizes are compared first, so that a file that was cut off is found at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from qe_edge.checkpoint.known_files import CONFIGURATION
from qe_edge.system.digests import file_digest
from qe_edge.system.errors import ArtifactError
from qe_edge.system.json_files import read_json_table

TOKENIZER = "tokenizer_config.json"
PART = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,200}")  # so neither '..' nor a hidden file
LOADED = (".onnx", ".data", ".engine", ".safetensors")  # endings of files that libraries load


def _plain_name(name: str) -> str:
    if not all(PART.fullmatch(part) for part in name.split("/")):
        raise ValueError("is no plain file name")
    return name


FileName = Annotated[str, AfterValidator(_plain_name)]  # relative to the folder, with '/' between its parts
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileRecord(BaseModel):
    """One file.

    Attributes:
        size: Bytes.
        sha256: Hash of its content.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int = Field(ge=0)
    sha256: Digest


FileTable = dict[FileName, FileRecord]


class Sealed(BaseModel):
    """A description of a folder that carries a digest of itself. With its table of files it covers the whole folder.

    Attributes:
        digest: SHA-256 of all other fields; empty until the description is written.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    digest: str = ""

    def write_sealed(self: SealedType, path: Path) -> SealedType:
        """Write the description with its digest as JSON; returns it."""
        sealed = self.model_copy(update={"digest": content_digest(json.loads(self.model_dump_json()))})
        path.write_text(sealed.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return sealed

    def check_seal(self, values: Mapping[str, object], path: Path, remedy: str) -> None:
        """Refuse a description that is not as it was written.

        Args:
            values: The table in the file. Fields that a later version added are not in it, and not in the digest.
            path: The file, for the message.
            remedy: What the user can do.

        Raises:
            ArtifactError: If the digest does not fit the content.
        """
        if self.digest != content_digest(values):
            raise ArtifactError(f"'{path}' was changed after it was written: its digest is another one.", remedy)


SealedType = TypeVar("SealedType", bound=Sealed)


def content_digest(values: Mapping[str, object]) -> str:
    """SHA-256 of a description without its digest, as JSON with sorted keys.

    Example:
        >>> content_digest({"a": 1, "digest": "x"}) == content_digest({"a": 1})
        True
    """
    content = {name: value for name, value in values.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(folder: Path, keep: Callable[[str], bool] = lambda _name: True) -> FileTable:
    """Size and hash of the files below a folder, by name.

    Args:
        folder: The folder.
        keep: Whether a file belongs to the table, by its name relative to the folder.

    Example:
        >>> Path("graphs").mkdir()
        >>> _ = Path("graphs/language.onnx").write_bytes(b"12345")
        >>> _ = Path("graphs/notes.txt").write_bytes(b"")
        >>> table = describe(Path("graphs"), keep=lambda name: name.endswith(".onnx"))
        >>> {name: record.size for name, record in table.items()}
        {'language.onnx': 5}
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: FileRecord.model_validate(file_digest(folder / name).as_json()) for name in names if keep(name)}


def check_files(folder: Path, table: Mapping[str, FileRecord], remedy: str, only: Collection[str] = ()) -> None:
    """Compare the files of a folder with its table: place, size and hash.

    Args:
        folder: The folder.
        table: Size and hash of every file when it was written.
        remedy: What the user can do about a file that differs.
        only: Names of the files to look at. Empty for all: then files that libraries read and the table lacks are
            refused too.

    Raises:
        ArtifactError: If a file is missing, lies outside the folder, has another size or content, or was added.

    Example:
        >>> Path("sound").mkdir()
        >>> _ = Path("sound/language.onnx").write_bytes(b"12345")
        >>> table = describe(Path("sound"))
        >>> check_files(Path("sound"), table, "Export again.")
        >>> _ = Path("sound/language.onnx").write_bytes(b"12354")
        >>> check_files(Path("sound"), table, "Export again.")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'sound/language.onnx' is damaged: its SHA-256 is not the one that was
        written. Export again.
    """
    wanted = {name: record for name, record in table.items() if not only or name in only}
    missing = next((name for name in only if name not in table), None)
    if missing:
        raise ArtifactError(f"'{folder}' is damaged: its list of files lacks '{missing}'.", remedy)
    check_sizes(folder, wanted, remedy)
    if not only:
        check_nothing_added(folder, table, remedy)
        _check_tokenizer_files(folder, remedy)
    for name, record in wanted.items():
        try:
            found = file_digest(folder / name).sha256
        except OSError as error:
            raise ArtifactError(f"'{folder / name}' cannot be read: {error.strerror}.", remedy) from error
        if found != record.sha256:
            raise ArtifactError(f"'{folder / name}' is damaged: its SHA-256 is not the one that was written.", remedy)


def check_sizes(folder: Path, table: Mapping[str, FileRecord], remedy: str) -> None:
    """The part of `check_files` that reads nothing: every file is there, inside the folder, and of its size.

    Raises:
        ArtifactError: If one is not.

    Example:
        >>> Path("cut").mkdir()
        >>> _ = Path("cut/language.onnx").write_bytes(b"12345")
        >>> table = describe(Path("cut"))
        >>> _ = Path("cut/language.onnx").write_bytes(b"123")
        >>> check_sizes(Path("cut"), table, "Export again.")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'cut/language.onnx' is damaged: it has 3 bytes and was written with
        5. Export again.
    """
    for name, record in table.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"'{folder}' is damaged: '{name}' is missing.", remedy)
        check_inside(folder, path)
        size = path.stat().st_size
        if size != record.size:
            raise ArtifactError(f"'{path}' is damaged: it has {size} bytes and was written with {record.size}.", remedy)


def check_nothing_added(folder: Path, table: Iterable[str], remedy: str) -> None:
    """Refuse configuration that the folder's table does not know: a library would read it.

    Raises:
        ArtifactError: If there is any.

    Example:
        >>> Path("more").mkdir()
        >>> _ = Path("more/tokenizer.json").write_text("{}")
        >>> check_nothing_added(Path("more"), ["config.json"], "Export again.")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'more/tokenizer.json' was added after the folder was written. Remove
        it, or: Export again.
    """
    known = set(table) | {name.partition("/")[0] for name in table}
    present = (path.name for path in folder.iterdir())
    added = sorted(name for name in present if name not in known and (name in CONFIGURATION or name.endswith(LOADED)))
    if added:
        raise ArtifactError(
            f"'{folder / added[0]}' was added after the folder was written.", f"Remove it, or: {remedy}"
        )
    for name in sorted(name for name in known & CONFIGURATION if (folder / name).is_dir()):
        for path in sorted((folder / name).rglob("*")):
            if not path.is_dir() and path.relative_to(folder).as_posix() not in known:
                raise ArtifactError(f"'{path}' was added after the folder was written.", f"Remove it, or: {remedy}")


def _check_tokenizer_files(folder: Path, remedy: str) -> None:
    """A tokenizer's configuration may name other files, anywhere, that transformers reads in the place of its own."""
    path = folder / TOKENIZER
    if path.is_file() and "fast_tokenizer_files" in read_json_table(path, remedy=remedy):
        raise ArtifactError(f"'{path}' names other files to read with 'fast_tokenizer_files'.", remedy)


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a file of a folder that is a link to a place outside.

    Raises:
        ArtifactError: If it is.

    Example:
        >>> Path("links").mkdir()
        >>> Path("links/config.json").symlink_to("../elsewhere.json")
        >>> check_inside(Path("links"), Path("links/config.json"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'links/config.json' is a link that points outside 'links'. Put the
        file itself in the place of the link.
    """
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(
            f"'{path}' is a link that points outside '{folder}'.", "Put the file itself in the place of the link."
        )
