"""`files.json` of a checkpoint: its files with their hashes, and the model that it was quantized from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qe_edge.checkpoint.integrity import FileRecord, FileTable, Sealed, check_files, describe
from qe_edge.checkpoint.known_files import model_files
from qe_edge.system.digests import file_digest
from qe_edge.system.errors import ArtifactError
from qe_edge.system.json_files import read_json_table

FILES = "files.json"
RECIPE = "recipe.json"
REMEDY = "Restore the checkpoint from a copy, or quantize the model again."


class Origin(BaseModel):
    """The model that a checkpoint was quantized from.

    Attributes:
        hub: Hub id; None for a folder.
        revision: Commit on the hub; None for a folder, or where it is not known.
        files: Of a folder, weights and configuration, whatever the folder's name; empty for the hub.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    hub: str | None = None
    revision: str | None = None
    files: dict[str, FileRecord] = Field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class CheckpointFiles(Sealed):
    """What a checkpoint consists of.

    Attributes:
        origin: What it was quantized from; None for a model that was made in Python.
        files: Every file but this one.
    """

    origin: Origin | None
    files: FileTable


def write_checkpoint_files(folder: Path, source: str, revision: str | None) -> None:
    """Write `files.json` into a folder that holds everything else.

    Args:
        folder: The checkpoint.
        source: Folder or hub id that the model was loaded from.
        revision: Commit of a model on the hub.
    """
    files = describe(folder, lambda name: name != FILES)
    CheckpointFiles(origin=origin_of(source, revision), files=files).write_sealed(folder / FILES)


def read_checkpoint_files(folder: Path) -> CheckpointFiles:
    """What a checkpoint says of itself; its files are not read.

    Raises:
        ArtifactError: If it says nothing, or that was changed.
    """
    path = folder / FILES
    if not path.is_file() and (folder / "config.json").is_file():
        raise ArtifactError(
            f"'{folder}' has no '{FILES}': an earlier version wrote it, or the file was lost.",
            "Quantize the model again, or install the version that wrote it.",
        )
    values = read_json_table(path, remedy=REMEDY)
    try:
        found = CheckpointFiles.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"'{path}' is damaged: {where} {first['msg'].lower()}.", REMEDY) from error
    found.check_seal(values, path, REMEDY)
    return found


def check_checkpoint(folder: Path, *only: str) -> None:
    """Compare a checkpoint's files with what was written; costs about half a second for a gigabyte.

    Args:
        folder: The checkpoint.
        only: Names of the files to compare; none compares all.

    Raises:
        ArtifactError: If a file is missing, changed, added, or lies elsewhere.
    """
    check_files(folder, read_checkpoint_files(folder).files, REMEDY, only)


def origin_of(source: str, revision: str | None) -> Origin | None:
    """The fingerprint of a model: files of a folder, or hub id and commit; None if it is neither."""
    folder = Path(source)
    if folder.is_dir():
        return Origin(files={name: _record(folder / name) for name in model_files(folder)})
    return Origin(hub=source, revision=revision) if source.count("/") == 1 else None


def difference(origin: Origin, folder: Path) -> str | None:
    """The first file of a folder that is not the one of a checkpoint's origin, None if all are the same."""
    names = set(model_files(folder))
    for name in sorted(names ^ origin.files.keys()):
        return name
    changed = (name for name in sorted(names) if (folder / name).stat().st_size != origin.files[name].size)
    hashed = (name for name in sorted(names) if file_digest(folder / name).sha256 != origin.files[name].sha256)
    return next(changed, None) or next(hashed, None)


def _record(path: Path) -> FileRecord:
    return FileRecord.model_validate(file_digest(path).as_json())
