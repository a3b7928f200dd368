"""`deploy.json`: the finished stages of a deployment, with a hash of their inputs and size and hash of their files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qe_edge.quantization.run_record import Record, changes, in_one_line
from qe_edge.system.atomic import atomic_file
from qe_edge.system.digests import FileDigest, file_digest, folder_digests, hash_parts
from qe_edge.system.errors import ArtifactError, QEError
from qe_edge.system.json_files import read_json_table


@dataclass(frozen=True)
class Finished:
    """A finished stage.

    Attributes:
        key: Hash of its inputs.
        files: Its files, by their names relative to the deployment's folder.
    """

    key: str
    files: dict[str, FileDigest]

    @property
    def content(self) -> str:
        """Hash of its outputs."""
        return hash_parts({name: digest.as_json() for name, digest in self.files.items()})


@dataclass
class Ledger:
    """The finished stages of a deployment.

    Attributes:
        path: Its file, in the deployment's folder.
        run: Record of the checkpoint's inputs; empty before the checkpoint is finished.
        stages: Finished stages by name.
    """

    path: Path
    run: Record = field(default_factory=dict)
    stages: dict[str, Finished] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, resume: bool) -> Ledger:
        """The ledger of a folder; an empty one if there is none, or an earlier version wrote it.

        Args:
            path: The file.
            resume: Whether to keep its stages. Then a damaged ledger is an error; otherwise it counts as none.

        Raises:
            ArtifactError: If it cannot be read.
        """
        if not (path.exists() or path.is_symlink()):
            return cls(path)
        try:
            values = read_json_table(path, remedy="Delete it; every stage is then made again.")
        except QEError:
            if resume:
                raise
            return cls(path)
        stages, run = values.get("stages"), values.get("run")
        if not isinstance(stages, dict) or not isinstance(run, dict):
            return cls(path)
        found = {name: stage for name, values in stages.items() if (stage := _parse_stage(values))}
        return cls(path, run, found)

    def refuse_changes(self, now: Record) -> None:
        """Refuse to continue a deployment of another model, recipe or calibration data.

        Raises:
            ArtifactError: Naming all that differs.
        """
        found = changes(self.run, now) if self.run else []
        if found:
            raise ArtifactError(
                f"The deployment in '{self.path.parent}' has another model, recipe or calibration data, or was made by "
                f"another version of QE-Edge: {in_one_line(found)}.",
                "Repeat the original command with --resume, or start again with --overwrite instead.",
            )

    def listed(self, folder: Path) -> set[str]:
        """Names, relative to a folder of the deployment, of the files that finished stages wrote there."""
        prefix = f"{folder.relative_to(self.path.parent).as_posix()}/"
        names = (name for stage in self.stages.values() for name in stage.files)
        return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}

    def problem(self, stage: str, key: str, outputs: Iterable[Path]) -> str | None:
        """Why a stage has to be done: "" if it never was, or its inputs differ; None if it is complete."""
        found = self.stages.get(stage)
        if found is None or found.key != key:
            return ""
        missing = next((output for output in outputs if not output.exists()), None)
        if missing:
            return f"'{missing}' is missing"
        for name, digest in found.files.items():
            path = self.path.parent / name
            if not digest.matches(path):
                return f"'{path}' {'changed' if path.is_file() else 'is missing'}"
        return None

    def finish(self, stage: str, key: str, outputs: Iterable[Path]) -> None:
        """Note that a stage is complete, with its files."""
        files: dict[str, FileDigest] = {}
        for output in outputs:
            name = output.relative_to(self.path.parent).as_posix()
            found = {f"/{inner}": digest for inner, digest in folder_digests(output).items()} if output.is_dir() else {}
            files |= {f"{name}{inner}": digest for inner, digest in (found or _single(output)).items()}
        self.stages[stage] = Finished(key, files)
        self.write()

    def forget(self, stages: Iterable[str]) -> None:
        """Take out stages whose output is removed."""
        for stage in list(stages):
            self.stages.pop(stage, None)
        self.write()

    def write(self) -> None:
        """Write the ledger."""
        stages = {
            name: {"key": stage.key, "files": {file: digest.as_json() for file, digest in stage.files.items()}}
            for name, stage in self.stages.items()
        }
        with atomic_file(self.path) as part:
            part.write_text(json.dumps({"run": self.run, "stages": stages}, indent=2) + "\n", encoding="utf-8")


def _single(path: Path) -> dict[str, FileDigest]:
    return {"": file_digest(path)} if path.is_file() else {}


def _parse_stage(values: object) -> Finished | None:
    """A stage of the file; None if it is none, or names files elsewhere."""
    table: dict[str, Any] = values if isinstance(values, dict) else {}
    key, files = table.get("key"), table.get("files")
    if not isinstance(key, str) or not isinstance(files, dict):
        return None
    found = {name: digest for name, values in files.items() if (digest := FileDigest.parse(values))}
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in files)
    return Finished(key, found) if inside and len(found) == len(files) else None
