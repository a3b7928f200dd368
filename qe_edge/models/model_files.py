"""Files beside a model's weights, in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qe_edge.models.guard import Guard
from qe_edge.system.errors import ModelError, QEError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from transformers.utils import hub
else:
    hub = lazy_module("transformers.utils.hub")


def find_file(source: str, name: str, error: type[QEError] = ModelError) -> Path | None:
    """Find a file of a model, and download it from the hub if needed; None if the model has no such file.

    Args:
        source: Folder or hub id.
        name: The file's name.
        error: Class of the error.

    Raises:
        QEError: Of the class `error`, if it is on the hub and cannot be downloaded.

    Example:
        >>> from qe_edge.demo import model_path
        >>> find_file(str(model_path()), "config.json").name
        'config.json'
        >>> find_file(str(model_path()), "no_such_file.json") is None
        True
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / name
        return path if path.exists() or path.is_symlink() else None  # reading a dangling link says what it is
    with Guard(
        f"'{name}' of '{source}' cannot be had from the hub",
        "Check the spelling and the network, or download the model and give its folder.",
        error,
    ):
        found = hub.cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
