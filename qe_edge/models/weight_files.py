"""The safetensors files of a model: all of them are present, all lie in its folder, and no other file does."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import huggingface_hub
from transformers.utils import hub

from qe_edge.checkpoint.known_files import ADAPTER
from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.models.origin import ADAPTER_FILES, adapter_beside, check_tensors
from qe_edge.system.errors import ModelError, QENotice, printable
from qe_edge.system.json_files import MEBIBYTE, read_json_table

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 64 * MEBIBYTE
READ = (".json", ".safetensors", ".txt", ".model", ".jinja")  # endings of the files that are read of a model
DOWNLOAD = "Download the model again."
COPY = "Copy the files that the links point at into the folder (cp -rL FOLDER COPY), or download the model again."

Header = dict[str, tuple[str, tuple[int, ...]]]


def check_links(folder: Path) -> None:
    """Refuse links that point at nothing, and links out of the folder.

    A folder may come from a stranger, and its contents end up in checkpoints and engines. Hub snapshots are folders of
    links to `../../blobs`. These belong to the same download, so they are followed.

    Raises:
        ModelError: Naming the first such link.

    Example:
        >>> Path("model.safetensors").symlink_to("no-such-file")
        >>> check_links(Path())
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: The link 'model.safetensors' points at a missing file. Copy the files
        that the links point at into the folder (cp -rL FOLDER COPY), or download the model again.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append((root.parent.parent / "blobs").resolve())
    for path in sorted((*folder.iterdir(), *(folder / ADAPTER).glob("*"))):
        if not path.is_symlink() or (path.suffix not in READ and path.name != ADAPTER):
            continue
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            raise ModelError(f"The link '{path}' points at a missing file.", COPY) from error
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise ModelError(f"The link '{path}' leads out of the model's folder.", COPY)


def weight_headers(source: str) -> dict[Path, Header]:
    """Headers of the safetensors files that hold a model's weights.

    Args:
        source: Folder or hub id.

    Raises:
        ModelError: If there are none, or they do not belong to an unquantized model.
        ArtifactError: If one is damaged.

    Example:
        >>> from qe_edge.demo import model_path
        >>> headers = weight_headers(str(model_path()))
        >>> [path.name for path in headers]
        ['model.safetensors']
    """
    if Path(source).is_dir():
        return folder_weights(Path(source))
    if _hub_file(source, ADAPTER_FILES[0], is_expected=False):
        raise adapter_beside(source, ADAPTER_FILES[0])
    single = _hub_file(source, SINGLE)
    index = None if single else _hub_file(source, INDEX)
    if single is None and index is None:
        raise ModelError(
            f"'{source}' has no .safetensors file on the hub.",
            "Convert the weights to safetensors; pickled weights are not loaded because they can run code.",
        )
    listed = read_index(index) if index else {}
    paths = {name: _hub_file(source, name) for name in sorted(set(listed.values()))} if index else {SINGLE: single}
    headers = {}
    for name, path in paths.items():
        if path is None:
            raise ModelError(f"'{source}' lacks the weight file '{name}' on the hub.", "Choose another revision.")
        headers[path] = check_safetensors(path)
        check_tensors(headers[path], path)
    if index:
        check_index(listed, headers, index)
    return headers


def folder_weights(folder: Path) -> dict[Path, Header]:
    """Headers of the files that hold a model's weights, as transformers chooses them.

    Args:
        folder: The model's folder.

    Raises:
        ModelError: If there are none, if one is missing or does not belong to the others, or if a tensor is none of an
            unquantized model.
        ArtifactError: If a file is damaged.

    Example:
        >>> from qe_edge.demo import model_path
        >>> ((path, header),) = folder_weights(model_path()).items()
        >>> dtype, shape = next(iter(header.values()))
        >>> path.name, len(header) > 50, dtype
        ('model.safetensors', True, 'BF16')
    """
    present = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    if not present and not (folder / INDEX).exists():
        raise ModelError(
            f"'{folder}' holds no .safetensors file.",
            "Convert the weights to safetensors; pickled weights are not loaded because they can run code.",
        )
    listed = read_index(folder / INDEX) if (folder / INDEX).exists() else None
    if listed is None:
        if SINGLE not in present:
            raise ModelError(
                f"'{folder}' holds '{present[0]}', and neither '{SINGLE}' nor '{INDEX}'.",
                f"{DOWNLOAD} Several weight files need their index.",
            )
        names = [SINGLE]
    else:
        names = sorted(set(listed.values()))
        if SINGLE in present and names != [SINGLE]:
            raise ModelError(
                f"'{folder}' holds '{SINGLE}' and an index of other weight files; only one of them is the model.",
                f"Remove '{SINGLE}', or '{INDEX}' and the files that it lists.",
            )
    missing = [name for name in names if name not in present]
    if missing:
        raise ModelError(
            f"'{folder}' lacks {len(missing)} of {len(names)} weight files, among them '{missing[0]}'.", DOWNLOAD
        )
    extra = [name for name in present if name not in names]
    if extra:
        raise ModelError(
            f"'{extra[0]}' in '{folder}' is no weight file of this model, so it would be left out.",
            f"Move it elsewhere if it is a leftover; if it belongs to the model, download '{INDEX}' that lists it.",
        )
    headers = {folder / name: check_safetensors(folder / name) for name in names}
    for path, header in headers.items():
        check_tensors(header, path)
    if listed is not None:
        check_index(listed, headers, folder / INDEX)
    return headers


def read_index(path: Path) -> dict[str, str]:
    """File of every tensor, from the index of a model in several files.

    Raises:
        ModelError: If it cannot be read, or names a file outside its folder.

    Example:
        >>> _ = Path("index.json").write_text('{"metadata": {}, "weight_map": {"norm.weight": "model-1.safetensors"}}')
        >>> read_index(Path("index.json"))
        {'norm.weight': 'model-1.safetensors'}
    """
    table = read_json_table(path, error=ModelError, remedy=DOWNLOAD, limit=MAX_INDEX)
    listed = table.get("weight_map")
    if not isinstance(table.get("metadata"), dict):
        raise ModelError(f"'{path}' has no table 'metadata'; transformers cannot read it.", DOWNLOAD)
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ModelError(f"'{path}' has no table 'weight_map' of file names.", DOWNLOAD)
    for name in set(listed.values()):
        if name != PureWindowsPath(name).name or "\0" in name:  # which is a bare name on any system
            raise ModelError(
                f"'{path}' lists '{printable(name)[:200]}', which is no file of its folder.",
                "Get the index from where the model comes from; nothing outside the folder is read.",
            )
        if not name.endswith(".safetensors"):
            raise ModelError(f"'{path}' lists '{printable(name)[:200]}', which is no .safetensors file.", DOWNLOAD)
    return listed


def check_index(listed: Mapping[str, str], headers: Mapping[Path, Header], index: Path) -> None:
    """Compare an index with the files that it lists.

    Raises:
        ModelError: If a tensor is in another file than the index says, or in none.

    Example:
        >>> headers = {Path("model-1.safetensors"): {"norm.weight": ("BF16", (64,))}}
        >>> check_index({"norm.weight": "model-1.safetensors"}, headers, Path("index.json"))  # fine
        >>> check_index({"norm.weight": "model-2.safetensors"}, headers, Path("index.json"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: 'index.json' says that 'model-2.safetensors' holds 'norm.weight', which
        it does not. Download the model again.
    """
    held = {(name, path.name) for path, header in headers.items() for name in header}
    for name, file in sorted(listed.items() - held):
        raise ModelError(f"'{index}' says that '{file}' holds '{printable(name)[:200]}', which it does not.", DOWNLOAD)
    for name, file in sorted(held - listed.items()):
        raise ModelError(
            f"'{file}' holds '{printable(name)[:200]}', which '{index}' does not list.",
            f"{DOWNLOAD} The index and the weight files are of different versions.",
        )


def _hub_file(source: str, name: str, *, is_expected: bool = True) -> Path | None:
    """A file of a model on the hub, downloaded if it is not here yet; None if there is none.

    On a terminal the hub's own bar shows the download, elsewhere the notice is all there is.
    """
    if is_expected and huggingface_hub.try_to_load_from_cache(source, name) is None:  # it may be there, and is not here
        warnings.warn(f"Looking for {name} of '{source}' on the hub, to download it.", QENotice, stacklevel=2)
    try:
        found = hub.cached_file(source, name)
    except (OSError, ValueError):
        return None
    return Path(found) if found else None
