"""The --max options of commands that build engines, as limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qe_edge.export.targets import has_limits
from qe_edge.runtime.limits import EngineLimits
from qe_edge.system.errors import InputError


def read_limits(targets: Sequence[str], options: Mapping[str, int | None]) -> EngineLimits:
    """The limits that `--max-...` ask for.

    Args:
        targets: Names of the targets that are to be built.
        options: By the names that click gives them, None where the user gave none.

    Raises:
        InputError: If there are some, and none of the targets has limits.
    """
    limits = EngineLimits(**{name.removeprefix("max_"): value for name, value in options.items()})
    if limits != EngineLimits() and not any(has_limits(name) for name in targets):
        raise InputError("Engines of ONNX Runtime have no limits of size.", "Leave the --max options out.")
    return limits
