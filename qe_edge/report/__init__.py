"""The report as one self-contained page and as data.

Imported when first used: plots need matplotlib, which is slow to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qe_edge.report.device_check import load_device_check
    from qe_edge.report.neighbours import find_changes
    from qe_edge.report.page import load_report, render_page, write_page, write_report

__all__ = ["find_changes", "load_device_check", "load_report", "render_page", "write_page", "write_report"]


def __getattr__(name: str) -> object:
    if name == "load_device_check":
        from qe_edge.report import device_check

        return device_check.load_device_check
    if name == "find_changes":
        from qe_edge.report import neighbours

        return neighbours.find_changes
    if name in __all__:
        from qe_edge.report import page

        return getattr(page, name)
    raise AttributeError(f"module 'qe_edge.report' has no attribute '{name}'")
