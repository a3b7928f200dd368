"""Finished blocks of a quantization run on disk, so that a killed run continues where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import qe_edge
from qe_edge.atomic import atomic_file
from qe_edge.budget import Offer, offers_from_json, offers_to_json
from qe_edge.errors import ArtifactError
from qe_edge.layer_files import read_layers, stored_keys, write_layers
from qe_edge.linear import QELinear
from qe_edge.models.stored import Source
from qe_edge.recipe import Recipe

MANIFEST = "run.json"


class WorkFolder:
    """One file per finished block, and a manifest that says which run they belong to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, recipe: Recipe, fingerprint: str, *, resume: bool) -> WorkFolder:
        """Create the folder, or continue in it.

        Raises:
            ArtifactError: If there is an unfinished run that was not asked for, or one of another model or recipe.
        """
        manifest = path / MANIFEST
        wanted = {"qe_edge": qe_edge.__version__, "model": fingerprint, "recipe": recipe.model_dump(mode="json")}
        if manifest.is_file():
            if not resume:
                raise ArtifactError(
                    f"'{path}' holds an unfinished run.", "Add --resume to continue it, or delete the folder."
                )
            try:
                found = json.loads(manifest.read_text(encoding="utf-8"))
            except ValueError:
                found = None
            if found != wanted:
                raise ArtifactError(
                    f"The unfinished run in '{path}' has another model, recipe or calibration data, or was made by "
                    "another version of QE-Edge.",
                    "Repeat the original command with --resume, or delete the folder.",
                )
        else:
            path.mkdir(parents=True, exist_ok=True)
            with atomic_file(manifest) as part:
                part.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
        return cls(path)

    def load(self, block: str) -> dict[str, QELinear] | None:
        """The finished layers of a block, or None."""
        path = self._file(block)
        return read_layers(path) if path.is_file() else None

    def save(self, block: str, layers: dict[str, QELinear]) -> None:
        """Write a block's layers; the file appears only when it is complete."""
        write_layers(self._file(block), layers)

    def sources(self, block: str) -> dict[str, Source]:
        """Where the tensors of a block's finished layers lie."""
        path = self._file(block)
        return {name: Source(path, key) for name, key in stored_keys(path).items()}

    def load_offers(self, block: str) -> dict[str, Offer] | None:
        """What a block's layers offer to a budget, or None where that was not measured or cannot be read."""
        path = self.path / f"{block}.offers.json"
        try:
            return offers_from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_offers(self, block: str, offers: Mapping[str, Offer]) -> None:
        """Write a block's offers."""
        with atomic_file(self.path / f"{block}.offers.json") as part:
            part.write_text(offers_to_json(offers), encoding="utf-8")

    def remove(self) -> None:
        """Delete the folder once the checkpoint is written."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, block: str) -> Path:
        return self.path / f"{block}.safetensors"
