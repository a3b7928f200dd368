"""Paths of a deployment's outputs, and the checks and locks of its folder; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qe_edge.checkpoint.known_files import work_folder
from qe_edge.system.errors import InputError
from qe_edge.system.locks import hold
from qe_edge.system.ownership import is_passing

LEDGER = "deploy.json"
DEFAULT_TARGETS = ("cpu",)


@dataclass(frozen=True)
class Layout:
    """Paths of a deployment's outputs.

    Attributes:
        root: The folder that holds everything.

    Example:
        >>> Layout(Path("out")).engines.as_posix()
        'out/engines'
    """

    root: Path

    @property
    def checkpoint(self) -> Path:
        """The quantized checkpoint."""
        return self.root / "checkpoint"

    @property
    def onnx(self) -> Path:
        """The exported graphs."""
        return self.root / "onnx"

    @property
    def engines(self) -> Path:
        """One folder for every target."""
        return self.root / "engines"

    @property
    def report(self) -> Path:
        """The report as data."""
        return self.root / "report.json"

    @property
    def page(self) -> Path:
        """The report as a page."""
        return self.root / "report.html"

    @property
    def ledger(self) -> Path:
        """The record of finished stages."""
        return self.root / LEDGER

    def made_later(self) -> list[Path]:
        """Folders that are made from a checkpoint: the graphs, and the engines of every target."""
        engines = sorted(self.engines.iterdir()) if self.engines.is_dir() and not self.engines.is_symlink() else []
        return [self.onnx, *(path for path in engines if path.is_dir())]


@contextmanager
def hold_deployment(out: Path) -> Iterator[None]:
    """No other process deploys to a folder, or quantizes to its checkpoint, while the context is open.

    Raises:
        ResourceError: If one does; it is raised at once.

    Example:
        >>> with hold_deployment(Path("out")):
        ...     print(sorted(path.name for path in Path("out").iterdir()))
        ['.checkpoint.lock', '.deploy.json.lock']
    """
    layout = Layout(out)
    with hold(layout.ledger, out), hold(layout.checkpoint):
        yield


def check_deployment_folder(out: Path) -> None:
    """Refuse a folder that holds files and no deployment.

    Raises:
        InputError: If it does.

    Example:
        >>> check_deployment_folder(Path("no-such-folder"))
        >>> Path("photos").mkdir()
        >>> _ = Path("photos/cat.jpg").write_bytes(b"")
        >>> check_deployment_folder(Path("photos"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: 'photos' holds files that 'deploy' did not write. Choose another folder.
    """
    found = [path.name for path in out.iterdir() if not is_passing(path.name)] if out.is_dir() else []
    if found and not is_deployment(out):
        raise InputError(f"'{out}' holds files that 'deploy' did not write.", "Choose another folder.")


def is_deployment(folder: Path) -> bool:
    """Whether `deploy` wrote a folder, complete or not.

    Example:
        >>> Path("deployed").mkdir()
        >>> _ = Path("deployed/deploy.json").write_text("{}")
        >>> is_deployment(Path("deployed")), is_deployment(Path("elsewhere"))
        (True, False)
    """
    layout = Layout(folder)
    signs = (layout.ledger, work_folder(layout.checkpoint) / "run.json", layout.checkpoint / "recipe.json")
    return any(sign.is_file() for sign in signs)
