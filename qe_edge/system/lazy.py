"""Public names of a package that are imported when they are first used, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package.

    Args:
        package: Name of the package.
        modules: For every public name the module that defines it.

    Returns:
        A function for the package's `__getattr__`; it raises AttributeError for any other name.

    Example:
        >>> lazy_names("mathematics", {"sqrt": "math"})("sqrt")
        <built-in function sqrt>
    """

    def find(name: str) -> object:
        if name in modules:
            return getattr(importlib.import_module(modules[name]), name)
        raise AttributeError(f"module '{package}' has no attribute '{name}'")

    return find
