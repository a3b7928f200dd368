"""Honest comparison of the original model, the quantized checkpoint and the built engine.

`validate` is imported when it is first used: the process that measures an engine's memory must not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qe_edge.validate.run import validate
    from qe_edge.validate.schema import Report

__all__ = ["Report", "validate"]


def __getattr__(name: str) -> object:
    if name == "validate":
        from qe_edge.validate.run import validate

        return validate
    if name == "Report":
        from qe_edge.validate.schema import Report

        return Report
    raise AttributeError(f"module 'qe_edge.validate' has no attribute '{name}'")
