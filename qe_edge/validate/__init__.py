"""Honest comparison of the original model, the quantized checkpoint and the built engine.

`validate` is imported when it is first used: the process that measures an engine's memory must not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qe_edge.system.lazy import lazy_names

if TYPE_CHECKING:
    from qe_edge.validate.actions import validate_actions
    from qe_edge.validate.run import validate
    from qe_edge.validate.schema import Report

__all__ = ["Report", "validate", "validate_actions"]

__getattr__ = lazy_names(__name__, {
    "Report": "qe_edge.validate.schema",
    "validate": "qe_edge.validate.run",
    "validate_actions": "qe_edge.validate.actions",
})  # fmt: skip
