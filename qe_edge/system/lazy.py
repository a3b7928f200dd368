"""Modules and names that are imported when they are first used: whoever mentions them starts at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType


class _LazyModule(ModuleType):
    """Stands for a module, and imports it when one of its names is used. See `lazy_module`."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__version__":  # tools look for such names in every object they meet
            raise AttributeError(f"the lazy module '{self.__name__}' has no '{name}' of its own")
        return getattr(importlib.import_module(self.__name__), name)


def lazy_module(name: str) -> ModuleType:
    """A heavy module in a light file: it is imported when one of its names is first used.

    A second branch tells mypy and the contract of the rooms what it stands for:

        if TYPE_CHECKING:
            import torch

            from qe_edge.models import decoder
        else:
            torch = lazy_module("torch")
            decoder = lazy_module("qe_edge.models.decoder")

    Args:
        name: Full name of the module.

    Returns:
        What stands for it. `torch.Tensor` is the real class, and a module that is missing raises ModuleNotFoundError.

    Example:
        >>> fractions = lazy_module("fractions")
        >>> fractions.Fraction(1, 2)
        Fraction(1, 2)
    """
    return _LazyModule(name)


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
