"""The report as one self-contained page and as data.

Its modules are imported at first use, because matplotlib is slow to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qe_edge.system.lazy import lazy_names

if TYPE_CHECKING:
    from qe_edge.report.device_check import load_device_check
    from qe_edge.report.neighbours import find_changes
    from qe_edge.report.page import load_report, render_page, write_page, write_report

__all__ = ["find_changes", "load_device_check", "load_report", "render_page", "write_page", "write_report"]

__getattr__ = lazy_names(__name__, {
    "find_changes": "qe_edge.report.neighbours",
    "load_device_check": "qe_edge.report.device_check",
    **dict.fromkeys(("load_report", "render_page", "write_page", "write_report"), "qe_edge.report.page"),
})  # fmt: skip
