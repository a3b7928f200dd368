"""Errors that a user can act on: one sentence says what is wrong, one says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QEError(Exception):
    """Base of every error that QE-Edge raises on purpose.

    Args:
        problem: One sentence saying what is wrong.
        remedy: One sentence saying what the user can do about it.
    """

    exit_code = 2

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem} {remedy}")
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[QEError], tuple[str, str]]:
        return type(self), (self.problem, self.remedy)


class QENotice(UserWarning):
    """Something that a user should know, in one line; the command line prints it, elsewhere Python warns."""


class CommonNotice(QENotice):
    """A notice that many inputs of one kind cause; the command line prints the same words once."""


class UnknownNameError(QEError):
    """A method, scheme, module, model family, target or recipe key that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"Did you mean '{close[0]}'? " if close else ""
        super().__init__(f"There is no {kind} '{name}'.", f"{hint}Known: {', '.join(names) or 'none'}.")


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
