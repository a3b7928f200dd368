"""Errors that a user can act on: one sentence says what is wrong, one says what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

VALUE_LENGTH = 80  # characters of a stranger's name or value in a message
REASON_LENGTH = 300  # of what a library says


def printable(text: str) -> str:
    r"""The text with control characters and lone surrogates written as escapes.

    Example:
        >>> print(printable("a\x1b[31mred"))
        a\x1b[31mred
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(value: object, length: int = VALUE_LENGTH) -> str:
    r"""A stranger's value as Python writes it, printable and cut off after `length` characters.

    Lists and tables inside are cut off too, so the time does not depend on their size.

    Example:
        >>> shown([1, "a\0b"]), shown("x" * 1000, 8)
        ("[1, 'a\\x00b']", "'xxxxxxx...")
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 4, 4 * length, 4 * length, 4 * length
    return _cut(printable(short.repr(value)), length)


def shown_name(name: object, length: int = VALUE_LENGTH) -> str:
    """A stranger's name without quotes, printable and cut off after `length` characters.

    Example:
        >>> shown_name("model.layers.0"), shown_name("x" * 100, 8), shown_name(["no", "name"])
        ('model.layers.0', 'xxxxxxxx...', "['no', 'name']")
    """
    return _cut(printable(name[: length + 1]), length) if isinstance(name, str) else shown(name, length)


def reason(error: BaseException) -> str:
    r"""One printable line about an exception, with its class where the message alone says little.

    Example:
        >>> reason(KeyError("weight")), reason(ValueError("not\n  a number."))
        ("KeyError: 'weight'", 'not a number')
    """
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ArithmeticError | AssertionError | AttributeError | LookupError | MemoryError | TypeError):
        text = f"{type(error).__name__}: {text}"
    return _cut(printable(text[: REASON_LENGTH + 1]), REASON_LENGTH)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


class QEError(Exception):
    """Base of every error that QE-Edge raises on purpose.

    Args:
        problem: One sentence saying what is wrong.
        remedy: One sentence saying what the user can do about it.

    Example:
        >>> error = InputError("'cat.txt' is no picture.", "Give a PNG or a JPEG file.")
        >>> error.problem, error.remedy, error.exit_code
        ("'cat.txt' is no picture.", 'Give a PNG or a JPEG file.', 2)
        >>> print(error)
        'cat.txt' is no picture. Give a PNG or a JPEG file.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[QEError], tuple[str, str]]:
        return type(self), (self.problem, self.remedy)


class QENotice(UserWarning):
    """Something that a user should know, in one line; the command line prints it, elsewhere Python warns.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as notices:
        ...     warnings.warn("The picture is scaled to 448 x 448.", QENotice)
        >>> str(notices[0].message)
        'The picture is scaled to 448 x 448.'
    """


class CommonNotice(QENotice):
    """A notice that many inputs of one kind cause; the command line prints the same words once.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as notices:
        ...     warnings.simplefilter("always")
        ...     for picture in ("0001.png", "0002.png"):
        ...         warnings.warn("A picture has no colours.", CommonNotice)
        >>> len({str(notice.message) for notice in notices})
        1
    """


class UnknownNameError(QEError):
    """A method, scheme, module, model family, target or recipe key that does not exist.

    Example:
        >>> print(UnknownNameError("method", "gtpq", ["awq", "gptq", "rtn"]))
        There is no method 'gtpq'. Did you mean 'gptq'? Known: awq, gptq, rtn.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names, name = sorted(known), shown_name(name)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        super().__init__(f"There is no {kind} '{name}'.", f"{hint}Known: {', '.join(names) or 'none'}.")


class ExtensionError(QEError):
    """An entry of a registry that an installed package offers and that cannot be used."""


class RecipeError(QEError):
    """A recipe value that makes no sense or cannot be met."""


class ModelError(QEError):
    """A model folder or hub id that cannot be used."""


class CalibrationError(QEError):
    """Calibration or evaluation data that is missing, broken or too small."""


class NumericalError(QEError):
    """NaN or infinity in weights or activations."""


class ArtifactError(QEError):
    """A checkpoint, ONNX or engine folder that is missing, damaged or of another version."""


class TargetError(QEError):
    """A build target that this machine or this library version cannot serve."""


class InputError(QEError):
    """A picture, prompt or path given by the user that cannot be used."""


class ResourceError(QEError):
    """Too little memory or disk for what was asked."""
