"""The list of an assembled folder's files, by which a second run knows that it may replace them."""

from __future__ import annotations

import json
from pathlib import Path

from qe_edge.checkpoint.integrity import describe


def write_list(folder: Path, script: str) -> None:
    """Write `files.json`: who made the folder, and size and hash of every file. `atomic_folder` then replaces it.

    Args:
        folder: A folder that holds everything else.
        script: Name of the script that made it.
    """
    files = {name: record.model_dump(mode="json") for name, record in describe(folder).items()}
    (folder / "files.json").write_text(json.dumps({"origin": script, "files": files}, indent=1), encoding="utf-8")
