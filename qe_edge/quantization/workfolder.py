"""Finished blocks of a quantization run on disk, so that a killed run continues where it stopped.

`run.json` records the inputs of the run, and lists every file with size and hash. Only listed files are ever removed,
and a file that has changed is made again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qe_edge.budget.model import Offer, offers_from_json, offers_to_json
from qe_edge.checkpoint.layer_files import read_layers, stored_keys, write_layers
from qe_edge.layers.linear import QELinear
from qe_edge.models.stored import Source
from qe_edge.quantization.run_record import Record, changes, environment_changes, in_one_line
from qe_edge.system.atomic import atomic_file, restore
from qe_edge.system.digests import FileDigest, file_digest
from qe_edge.system.errors import (
    ArtifactError,
    CalibrationError,
    InputError,
    ModelError,
    NumericalError,
    QEError,
    QENotice,
    RecipeError,
)
from qe_edge.system.json_files import read_json_table
from qe_edge.system.ownership import is_passing

MANIFEST = "run.json"
ON_INPUT = (CalibrationError, InputError, ModelError, NumericalError, RecipeError)
LIST_LIMIT = 256 * 2**20  # bytes of the manifest of a run with hundreds of thousands of blocks


class WorkFolder:
    """One file per finished block, and a manifest that says which run they belong to.

    Example:
        >>> import qe_edge, torch
        >>> layer = qe_edge.quantize_linear(torch.ones(4, 32), torch.ones(2, 32), qe_edge.make_recipe(method="rtn"))
        >>> run = {"qe_edge": "0.1.0", "model": {}, "recipe": {}}
        >>> WorkFolder.open(Path("run.work"), run, resume=False).save("layers.0", {"layers.0.up": layer})
        >>> again = WorkFolder.open(Path("run.work"), run, resume=True)  # after a stop
        >>> list(again.load("layers.0")), again.load("layers.1")
        (['layers.0.up'], None)
    """

    def __init__(self, path: Path, run: Record, files: dict[str, FileDigest | None]) -> None:
        self.path = path
        self._run = run
        self._files = files  # None for one that is being written

    @classmethod
    def open(cls, path: Path, run: Record, *, resume: bool) -> WorkFolder:
        """Create the folder, or continue in it.

        Raises:
            ArtifactError: If there is an unfinished run that was not asked for, or one that depends on something else.
            InputError: If others' files lie there.
        """
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"'{path}' is a link or a file; unfinished runs are kept there.", "Remove or rename it.")
        if (path / MANIFEST).exists():
            if not resume:
                raise ArtifactError(
                    f"'{path}' holds an unfinished run.", "Add --resume to continue it, or delete the folder."
                )
            values = _read(path)
            _refuse_changes(path, values.get("run"), run)
            files = _listed(values)
            folders = sorted(name for name in files if (path / name).is_dir())
            if folders:
                raise ArtifactError(
                    f"'{path / folders[0]}' is a folder, where the unfinished run had a file.", "Rename it or move it."
                )
            return cls(path, run, files)
        if path.is_dir() and (others := [name.name for name in path.iterdir() if not is_passing(name.name)]):
            raise InputError(
                f"'{path}' holds '{min(others)}' and no unfinished run; unfinished runs are kept there.",
                "Move what it holds elsewhere, or choose another output.",
            )
        folder = cls(path, run, {})
        folder._write()
        return folder

    @classmethod
    def discard(cls, path: Path) -> None:
        """Remove an unfinished run, whatever it is; files that it does not list stay."""
        if not path.is_symlink() and (path / MANIFEST).is_file():
            cls(path, {}, _listed(_read(path))).remove()

    @staticmethod
    def run_of(path: Path) -> Record:
        """The record of the run in a folder; empty if there is none."""
        run = _read(path).get("run")
        return run if isinstance(run, dict) else {}

    @contextmanager
    def removed_if_useless(self) -> Iterator[WorkFolder]:
        """Remove the folder if the run fails on its model, recipe or data, since the corrected run has other inputs.

        A run that fails on the machine, or is stopped, keeps its finished blocks.
        """
        try:
            yield self
        except ON_INPUT:
            self.remove()
            raise
        except BaseException:
            if not self._files:
                self.remove()
            raise

    def load(self, block: str) -> dict[str, QELinear] | None:
        """The finished layers of a block, or None."""
        return read_layers(self.path / _layers(block)) if self.holds(_layers(block)) else None

    def save(self, block: str, layers: dict[str, QELinear]) -> None:
        """Write a block's layers; the file appears only when it is complete."""
        self.expect(_layers(block))
        write_layers(self.path / _layers(block), layers)
        self.wrote(_layers(block))

    def sources(self, block: str) -> dict[str, Source]:
        """The places of the tensors of a block's finished layers."""
        path = self.path / _layers(block)
        return {name: Source(path, key) for name, key in stored_keys(path).items()}

    def load_offers(self, block: str) -> dict[str, Offer] | None:
        """The offers of a block's layers to a budget, or None if they were not measured."""
        name = _offers(block)
        return offers_from_json((self.path / name).read_text(encoding="utf-8")) if self.holds(name) else None

    def save_offers(self, block: str, offers: Mapping[str, Offer]) -> None:
        """Write a block's offers."""
        self.expect(_offers(block))
        with atomic_file(self.path / _offers(block)) as part:
            part.write_text(offers_to_json(offers), encoding="utf-8")
        self.wrote(_offers(block))

    def holds(self, name: str) -> bool:
        """Whether a file is there and unchanged. A notice tells the user of a changed one."""
        digest = self._files.get(name)
        if digest is None:
            return False
        if digest.matches(self.path / name):
            return True
        warnings.warn(f"'{self.path / name}' is not as it was written; it is computed again.", QENotice, stacklevel=2)
        return False

    def expect(self, name: str) -> None:
        """List a file before it is written, so that the file of a killed run is known as ours."""
        self._files[name] = None
        self._write()

    def wrote(self, name: str) -> None:
        """Note the size and hash of a file."""
        self._files[name] = file_digest(self.path / name)
        self._write()

    def remove(self) -> None:
        """Delete the listed files, once the checkpoint is written, and the folder if nothing else is in it."""
        for name in (*self._files, MANIFEST):  # the manifest last: a removal that is stopped can be repeated
            restore(self.path / name)
            if not (self.path / name).is_dir() or (self.path / name).is_symlink():  # a folder is somebody else's
                (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def _write(self) -> None:
        files = {name: digest and digest.as_json() for name, digest in self._files.items()}
        with atomic_file(self.path / MANIFEST) as part:
            part.write_text(json.dumps({"run": self._run, "files": files}, indent=1), encoding="utf-8")


def _layers(block: str) -> str:
    return f"{block}.safetensors"


def _offers(block: str) -> str:
    return f"{block}.offers.json"


def _read(path: Path) -> dict[str, Any]:
    """The manifest; empty if it cannot be read."""
    try:
        return read_json_table(path / MANIFEST, limit=LIST_LIMIT)
    except QEError:
        return {}


def _listed(values: Mapping[str, Any]) -> dict[str, FileDigest | None]:
    """The files of a manifest; a name that leads elsewhere is none of ours."""
    files = values.get("files")
    found = files if isinstance(files, dict) else {}
    return {name: FileDigest.parse(digest) for name, digest in found.items() if Path(name).name == name}


def _refuse_changes(path: Path, before: object, now: Record) -> None:
    """Refuse to continue a run that depends on something else.

    Raises:
        ArtifactError: Naming all that differs.
    """
    remedy = "Repeat the original command with --resume, or start again with --overwrite."
    if not isinstance(before, dict):
        what = f"'{MANIFEST}' does not say which"
    else:
        what = in_one_line(changes(before, now))
        environment = environment_changes(before, now)
        if environment and not what:
            raise ArtifactError(
                f"The unfinished run in '{path}' was made in another environment, which changes the last bits of its "
                f"results ({in_one_line(environment)}).",
                f"Continue as it began{_how_many_threads(before, now)}, or start again with --overwrite.",
            )
    if what:
        raise ArtifactError(
            f"The unfinished run in '{path}' has another model, recipe or calibration data, or was made by another "
            f"version of QE-Edge: {what}.",
            remedy,
        )


def _how_many_threads(before: Mapping[str, Any], now: Record) -> str:
    environment = before.get("environment")
    threads = environment.get("threads") if isinstance(environment, dict) else None
    return "" if threads == now["environment"]["threads"] else f", with OMP_NUM_THREADS={threads}"
