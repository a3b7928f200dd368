"""The report says when its times were taken on a busy machine."""

from __future__ import annotations

import psutil
import pytest

from qe_edge.validate.machine import busy_note, describe_machine


def test_a_busy_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (4.5, 0.0, 0.0))
    assert busy_note() is None
    monkeypatch.setattr(psutil, "getloadavg", lambda: (11.8, 0.0, 0.0))
    assert "load 12 on 4 cores" in (busy_note() or "")


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.processor
    assert machine.cores >= 1
    assert {"torch", "transformers", "onnxruntime"} <= set(machine.libraries)
