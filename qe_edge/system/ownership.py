"""Which files of a folder QE-Edge wrote; no others are ever removed.

A folder's own list of files decides (`files.json` of a checkpoint, `manifest.json` of graphs and engines). Folders of
earlier versions have no list: there the names decide that those versions wrote.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from qe_edge.system.errors import InputError, QEError
from qe_edge.system.json_files import read_json_table

CONFIGURATION = frozenset({
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "recipe.json", "run.json",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
})  # fmt: skip
CHECKPOINT = CONFIGURATION | {"model.safetensors"}
GRAPHS = CONFIGURATION | {"embedding.safetensors"}
TEMPLATES = "additional_chat_templates"
LISTS = ("files.json", "manifest.json", "engine.json")
PASSING = (".lock", ".part")  # endings of hidden names that exist only while something is written


def strangers(folder: Path, listed: Collection[str] = ()) -> list[Path]:
    """Files and folders inside a folder that QE-Edge did not write, relative to it.

    A folder that holds no file of ours is named as a whole.

    Args:
        folder: The folder; one that does not exist holds nothing.
        listed: Names of files that are known to be ours, relative to the folder, with '/' between their parts.

    Example:
        >>> Path("answers").mkdir()
        >>> _ = Path("answers/mine.txt").write_text("a file of a user")
        >>> [path.as_posix() for path in strangers(Path("answers"))]
        ['mine.txt']
    """
    if folder.is_symlink() or not folder.is_dir():
        return []
    known = {*_known(folder), *listed}
    return sorted(_unknown(folder, Path(), known))


def is_passing(name: str) -> bool:
    """Whether a name belongs to a lock or to a temporary file or folder of ours.

    Example:
        >>> is_passing(".checkpoint.lock"), is_passing("checkpoint")
        (True, False)
    """
    return name.startswith(".") and name.endswith(PASSING)


def refuse_strangers(folder: Path, listed: Collection[str] = ()) -> None:
    """Refuse to replace a folder that holds files of others.

    Raises:
        InputError: Naming one of them.

    Example:
        >>> Path("photos").mkdir()
        >>> _ = Path("photos/cat.jpg").write_bytes(b"")
        >>> refuse_strangers(Path("photos"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: 'photos/cat.jpg' was not written by QE-Edge, and 'photos' is to be
        replaced. Move it elsewhere, or choose another folder.
    """
    found = strangers(folder, listed)
    if found:
        raise InputError(
            f"'{folder / found[0]}' was not written by QE-Edge, and '{folder}' is to be replaced.",
            "Move it elsewhere, or choose another folder.",
        )


def remove_ours(folder: Path, listed: Collection[str] = ()) -> None:
    """Remove the files of a folder that QE-Edge wrote, and the folder if nothing else is in it.

    Example:
        >>> Path("old").mkdir()
        >>> _ = Path("old/mine.txt").write_text("a file of a user")
        >>> _ = Path("old/log.txt").write_text("a file of ours")
        >>> remove_ours(Path("old"), listed=["log.txt"])
        >>> [path.name for path in Path("old").iterdir()]
        ['mine.txt']
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    kept = {folder / name for name in strangers(folder, listed)}
    for place, folders, names in os.walk(folder, topdown=True):
        folders[:] = [name for name in folders if Path(place) / name not in kept]
        for name in names:
            if Path(place) / name not in kept:
                (Path(place) / name).unlink(missing_ok=True)
    for place, _, _ in os.walk(folder, topdown=False):
        if Path(place) not in kept and not any(Path(place).iterdir()):
            Path(place).rmdir()


def _unknown(folder: Path, inside: Path, known: Collection[str]) -> Iterator[Path]:
    for path in (folder / inside).iterdir():
        name = (inside / path.name).as_posix()
        if path.is_dir() and not path.is_symlink():
            if any(other.startswith(f"{name}/") for other in known):
                yield from _unknown(folder, inside / path.name, known)
            elif not is_passing(path.name):
                yield Path(name)
        elif name not in known and not is_passing(path.name):
            yield Path(name)


def _known(folder: Path) -> set[str]:
    """Names of our files by the folder's own list, or by its kind; empty for a folder of others."""
    manifest, sealed = _table(folder / "manifest.json"), _table(folder / "files.json")
    graphs = manifest.get("graphs")
    for listed in (sealed if "origin" in sealed else {}, manifest if isinstance(graphs, dict) else {}):
        if _is_file_table(listed.get("files")):
            return {*listed["files"], *LISTS}
    templates = {f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")}
    section = _table(folder / "config.json").get("quantization_config")
    if isinstance(section, dict) and section.get("quant_method") == "qe-edge":
        return {*CHECKPOINT, *templates}
    if isinstance(graphs, dict) and "format_version" in manifest:
        files = [graph.get("file") for graph in graphs.values() if isinstance(graph, dict)]
        named = {f"{file}{ending}" for file in files for ending in ("", ".data")}
        return {*GRAPHS, *LISTS, *named, *templates}
    return set()


def _is_file_table(values: object) -> bool:
    """Whether this is a table of files as we write it: size and hash by name."""
    return (
        isinstance(values, dict)
        and bool(values)
        and all(isinstance(record, dict) and record.keys() == {"size", "sha256"} for record in values.values())
    )


def _table(path: Path) -> dict[str, Any]:
    try:
        return read_json_table(path)
    except QEError:
        return {}
