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
    """The content of `files.json`.

    Attributes:
        origin: The model that it was quantized from; None for a model that was made in Python.
        files: Every file but this one.

    Example:
        >>> Path("own").mkdir()
        >>> _ = Path("own/config.json").write_text("{}")
        >>> write_checkpoint_files(Path("own"), "OpenGVLab/InternVL3-1B-hf", revision="abc123")
        >>> found = read_checkpoint_files(Path("own"))
        >>> found.origin.hub, list(found.files)
        ('OpenGVLab/InternVL3-1B-hf', ['config.json'])
    """

    origin: Origin | None
    files: FileTable


def write_checkpoint_files(folder: Path, source: str, revision: str | None) -> None:
    """Write `files.json` into a folder that holds everything else.

    Args:
        folder: The checkpoint.
        source: Folder or hub id that the model was loaded from.
        revision: Commit of a model on the hub.

    Example:
        >>> Path("first").mkdir()
        >>> _ = Path("first/config.json").write_text("{}")
        >>> write_checkpoint_files(Path("first"), source="OpenGVLab/InternVL3-1B-hf", revision=None)
        >>> sorted(path.name for path in Path("first").iterdir())
        ['config.json', 'files.json']
    """
    files = describe(folder, lambda name: name != FILES)
    CheckpointFiles(origin=origin_of(source, revision), files=files).write_sealed(folder / FILES)


def read_checkpoint_files(folder: Path) -> CheckpointFiles:
    """Read and check `files.json` of a checkpoint; the files that it lists are not read.

    Raises:
        ArtifactError: If there is none, or it was changed after it was written.

    Example:
        >>> Path("second").mkdir()
        >>> _ = Path("second/config.json").write_text("{}")
        >>> write_checkpoint_files(Path("second"), source="OpenGVLab/InternVL3-1B-hf", revision=None)
        >>> {name: record.size for name, record in read_checkpoint_files(Path("second")).files.items()}
        {'config.json': 2}
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
    """Compare a checkpoint's files with their sizes and hashes in `files.json`: about half a second for a gigabyte.

    Args:
        folder: The checkpoint.
        only: Names of the files to compare; none compares all.

    Raises:
        ArtifactError: If a file is missing, changed, added, or lies elsewhere.

    Example:
        >>> Path("third").mkdir()
        >>> _ = Path("third/config.json").write_text("{}")
        >>> write_checkpoint_files(Path("third"), source="OpenGVLab/InternVL3-1B-hf", revision=None)
        >>> check_checkpoint(Path("third"))
        >>> _ = Path("third/config.json").write_text("{ }")
        >>> check_checkpoint(Path("third"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'third/config.json' is damaged: it has 3 bytes and was written with
        2. Restore the checkpoint from a copy, or quantize the model again.
    """
    check_files(folder, read_checkpoint_files(folder).files, REMEDY, only)


def origin_of(source: str, revision: str | None) -> Origin | None:
    """The fingerprint of a model: files of a folder, or hub id and commit; None if it is neither.

    Example:
        >>> origin_of("OpenGVLab/InternVL3-1B-hf", revision="abc123")
        Origin(hub='OpenGVLab/InternVL3-1B-hf', revision='abc123', files={})
    """
    folder = Path(source)
    if folder.is_dir():
        return Origin(files={name: _record(folder / name) for name in model_files(folder)})
    return Origin(hub=source, revision=revision) if source.count("/") == 1 else None


def difference(origin: Origin, folder: Path) -> str | None:
    """The first file of a folder that differs from the checkpoint's origin, None if all are the same.

    Example:
        >>> Path("model").mkdir()
        >>> _ = Path("model/config.json").write_text("{}")
        >>> origin = origin_of("model", None)
        >>> difference(origin, Path("model")) is None
        True
        >>> _ = Path("model/config.json").write_text('{"hidden_size": 64}')
        >>> difference(origin, Path("model"))
        'config.json'
    """
    names = set(model_files(folder))
    for name in sorted(names ^ origin.files.keys()):
        return name
    changed = (name for name in sorted(names) if (folder / name).stat().st_size != origin.files[name].size)
    hashed = (name for name in sorted(names) if file_digest(folder / name).sha256 != origin.files[name].sha256)
    return next(changed, None) or next(hashed, None)


def _record(path: Path) -> FileRecord:
    return FileRecord.model_validate(file_digest(path).as_json())
