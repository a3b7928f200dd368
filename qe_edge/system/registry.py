"""Name-to-object tables whose entries are imported only when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar, cast

from qe_edge.system.errors import UnknownNameError

T = TypeVar("T")


class Registry(Generic[T]):
    """A read-only table `name -> "module:attribute"`.

    Listing names imports nothing, so `qe-edge --help` stays fast; adding an entry is one line.

    Args:
        kind: What the entries are, in the words of an error message ("method", "target").
        entries: For every name the module and attribute that hold the object.
    """

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def check(self, name: str) -> str:
        """Return `name` if it is registered.

        Raises:
            UnknownNameError: If it is not; the message names the nearest known entry.
        """
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return name

    def __getitem__(self, name: str) -> T:
        module, _, attribute = self._entries[self.check(name)].partition(":")
        return cast("T", getattr(importlib.import_module(module), attribute))
