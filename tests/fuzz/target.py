"""What a target of the fuzzer is, and what can be wrong with a change that is accepted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        name: As on the command line.
        prepare: Writes the sound files into a folder; `sound` holds those of other targets by name.
        read: Reads a folder as a command does, and returns what it found, for `judge`.
        files: Which files change, as patterns.
        after: Target that has to be prepared first.
        judge: What is wrong with a change that is accepted, from what `read` finds in the sound files and in the
            changed ones; "" if nothing is.
        repairs: Whether a file that is not as its hash says may be made again instead of being refused.
        sealed: Folder whose hashes are made those of the changed files, as a stranger who knows the format can; "" for
            none.
    """

    name: str
    prepare: Callable[[Path, Mapping[str, Path]], object]
    read: Callable[[Path], str]
    files: tuple[str, ...]
    after: str = ""
    judge: Callable[[str, str], str] = lambda _sound, _found: ""
    repairs: bool = False
    sealed: str = ""


class SilentSuccessError(Exception):
    """Something was accepted that cannot be right."""


def digest(*values: object) -> str:
    """Hash of numbers, texts, tensors, and lists and tables of them."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            found.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, Mapping):
            found.update(digest(*(part for pair in value.items() for part in pair)).encode())
        elif isinstance(value, list | tuple):
            found.update(digest(*value).encode())
        else:
            found.update(f"{type(value).__name__} {value!r}".encode())
    return found.hexdigest()


def nothing_lost(sound: str, found: str) -> str:
    """Of names, one a line: all of the sound files' are there."""
    lost = sorted(set(sound.splitlines()) - set(found.splitlines()))
    return f"{len(lost)} tensors of the model are lost, among them {lost[0]}" if lost else ""


def unchanged(sound: str, found: str) -> str:
    """The result is that of the sound files."""
    return "" if sound == found else "the result differs from that of the sound files"


def check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """All tensors of numbers are finite.

    Raises:
        SilentSuccessError: Naming the first that is not.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise SilentSuccessError(f"'{name}' is not finite")
