"""Name-to-object tables whose entries are imported only when they are asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar, cast

from qe_edge.system.errors import ExtensionError, UnknownNameError, reason, shown_name

T = TypeVar("T")
# what importing somebody's module raises when the module is wrong or a library of its is missing
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


class Registry(Generic[T]):
    """A read-only table `name -> "module:attribute"`.

    Listing names imports nothing, so `qe-edge --help` stays fast; adding an entry is one line. Other packages may offer
    entries too, as entry points of a group. They cannot replace names of ours. Iterating gives our names alone.

    Args:
        kind: What the entries are, in the words of an error message ("method", "target").
        entries: For every name the module and attribute that hold the object.
        group: Entry points of other packages that are entries too; None for none.
        base: Class that other packages' entries must be derived from.

    Example:
        >>> colours = Registry("number class", {"half": "fractions:Fraction"})
        >>> colours["half"](1, 2)
        Fraction(1, 2)
    """

    def __init__(
        self, kind: str, entries: Mapping[str, str], *, group: str | None = None, base: type | None = None
    ) -> None:
        self.kind = kind
        self._entries = dict(entries)
        self._group = group
        self._base = base

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._offered()

    def check(self, name: str) -> str:
        """Return `name` if it is registered.

        Raises:
            UnknownNameError: If it is not; the message names the nearest known entry.
        """
        if name not in self:
            raise UnknownNameError(self.kind, name, [*self._entries, *self._offered()])
        return name

    def __getitem__(self, name: str) -> T:
        if self.check(name) not in self._entries:
            return self._load(name)
        module, _, attribute = self._entries[name].partition(":")
        return cast("T", getattr(importlib.import_module(module), attribute))

    def package(self, name: str) -> str | None:
        """Name and version of the package that offers an entry; None for an entry of our own.

        Raises:
            UnknownNameError: If there is no entry of that name.
            ExtensionError: If several packages offer it.
        """
        return None if self.check(name) in self._entries else _package(self._offer(name))

    def _offered(self) -> dict[str, list[EntryPoint]]:
        """What installed packages offer, by name. Reads their descriptions, imports nothing of theirs."""
        if self._group is None:
            return {}
        found: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self._group):
            found.setdefault(entry.name, []).append(entry)
        return found

    def _offer(self, name: str) -> EntryPoint:
        offers = {_package(entry): entry for entry in self._offered()[name]}
        if len(offers) > 1:
            raise ExtensionError(
                f"Several packages offer the {self.kind} '{shown_name(name)}': {', '.join(sorted(offers))}.",
                "Uninstall all but one of them.",
            )
        return next(iter(offers.values()))

    def _load(self, name: str) -> T:
        """Import what a package offers.

        Raises:
            ExtensionError: If it cannot be imported, or is something else.
        """
        entry = self._offer(name)
        what = f"The {self.kind} '{shown_name(name)}' of the package '{_package(entry)}'"
        try:
            found = entry.load()
        except FAILURES as error:
            raise ExtensionError(
                f"{what} cannot be imported: {reason(error)}.", "Mend that package, or uninstall it."
            ) from error
        if self._base is not None and not (isinstance(found, type) and issubclass(found, self._base)):
            raise ExtensionError(
                f"{what} is no subclass of {self._base.__module__}.{self._base.__qualname__}.",
                f"Let its entry point in the group '{self._group}' name such a class.",
            )
        return cast("T", found)


def _package(entry: EntryPoint) -> str:
    return shown_name(f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module)
