"""Turn a library's exceptions about a stranger's file into errors that a user can act on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qe_edge.system.errors import REASON_LENGTH, ModelError, QEError, reason, shown, shown_name

# exceptions of transformers, huggingface_hub, jinja2 and Python itself for unexpected values
RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# modules whose exceptions have no better base than Exception; pyo3 is how a panic of tokenizers arrives
RAISING_MODULES = ("huggingface_hub", "jinja2", "pyo3_runtime")

Model = TypeVar("Model", bound=BaseModel)


class Guard:
    """A context around one call of a library that reads a stranger's file.

    tokenizers raises `Exception` itself. The guard translates that class, and none of its other subclasses.

    Args:
        problem: The first sentence without the reason and the full stop: "config.json cannot be read".
        remedy: The second sentence.
        error: Class of the error.

    Raises:
        QEError: Of the class `error`, in place of what the library raised. A `QEError` passes unchanged.

    Example:
        >>> with Guard("'a.json' cannot be read", "Get it again."):
        ...     {}["vocab"]
        Traceback (most recent call last):
        qe_edge.system.errors.ModelError: 'a.json' cannot be read: KeyError: 'vocab'. Get it again.
    """

    def __init__(self, problem: str, remedy: str, error: type[QEError] = ModelError) -> None:
        self.problem = problem
        self.remedy = remedy
        self.error = error

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Translate what was raised."""
        if kind is None or error is None or issubclass(kind, QEError):
            return
        module = kind.__module__.partition(".")[0]
        if issubclass(kind, RAISED) or kind is Exception or module in RAISING_MODULES:
            raise self.error(f"{self.problem}: {reason(error)}.", self.remedy) from error


def check_values(kind: type[Model], values: object, path: Path | str, remedy: str, error: type[QEError]) -> Model:
    """Check the values of a file against their bounds.

    Args:
        kind: The keys with their types and bounds.
        values: A table, or an object with such attributes where `kind` says so.
        path: The file that they came from.
        remedy: The second sentence of an error.
        error: Class of the error.

    Raises:
        QEError: Of the class `error`, naming file, key and value.

    Example:
        >>> class Sizes(BaseModel):
        ...     width: int
        >>> check_values(Sizes, {"width": 8}, "sizes.json", "Get it again.", ModelError).width
        8
        >>> check_values(Sizes, {"width": "wide"}, "sizes.json", "Get it again.", ModelError)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: Key 'width' of 'sizes.json' is wrong: Input should be a valid integer,
        unable to parse string as an integer (got 'wide'). Get it again.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = shown_name(_path(values, first["loc"]), REASON_LENGTH)
        got = shown(first["input"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        where = f"key '{key}' of '{path}'" if key else f"'{path}'"
        raise error(f"{where[0].upper()}{where[1:]} is wrong: {message} (got {got}).", remedy) from problem


def check_key_names(kind: type, keys: Iterable[str], path: Path | str, remedy: str, error: type[QEError]) -> None:
    """Refuse keys that stand for a method of a class: transformers would put the value in its place.

    Raises:
        QEError: Of the class `error`, naming file and key.

    Example:
        >>> from transformers import GenerationConfig
        >>> check_key_names(GenerationConfig, ["update"], "generation_config.json", "Get it again.", ModelError)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: Key 'update' of 'generation_config.json' is no setting of a model. Get
        it again.
    """
    fields = {found.name for found in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    for key in keys:
        found = getattr(kind, key, None) if key not in fields else None
        of_class = callable(found) or (bool(fields) and isinstance(found, dict))
        if of_class or (key.startswith("__") and found is not None):
            raise error(f"Key '{shown_name(key)}' of '{path}' is no setting of a model.", remedy)


def _path(values: object, location: tuple[int | str, ...]) -> str:
    """Dotted path of a value, without the names that pydantic puts between for the members of a union."""
    parts: list[str] = []
    node: Any = values
    for number, part in enumerate(location):
        in_list = isinstance(node, list) and isinstance(part, int) and part < len(node)
        if in_list or (isinstance(node, dict) and part in node):
            node = node[part]
        elif isinstance(part, str) and hasattr(node, part):
            node = getattr(node, part)
        elif number < len(location) - 1 or not isinstance(node, dict):
            continue
        parts.append(str(part))
    return ".".join(parts)
