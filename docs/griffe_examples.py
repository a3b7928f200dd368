"""Docstrings head their example with `Example:`; griffe knows `Examples:` as code that a reader may copy."""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADING = re.compile(r"^Example:$", re.M)


class Examples(griffe.Extension):
    """Turns the heading into the one that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - griffe's signature
        """Change the docstring of any module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = HEADING.sub("Examples:", obj.docstring.value)
