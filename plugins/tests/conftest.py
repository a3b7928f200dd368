"""Machines and the launch plan, built once per run."""

from __future__ import annotations

import pytest

from emulator.build import ptx, source_emulator
from emulator.plan import Planner
from emulator.ptx import PtxMachine
from emulator.source import SourceMachine


@pytest.fixture(scope="session")
def planner() -> Planner:
    return Planner.load(source_emulator())


@pytest.fixture(scope="session")
def source_machine() -> SourceMachine:
    return SourceMachine(source_emulator())


@pytest.fixture(scope="session")
def preempting_machine() -> SourceMachine:
    """Threads also hand over in the middle of plain code."""
    return SourceMachine(source_emulator(), preempt_every=50)


@pytest.fixture(scope="session")
def ptx_machine() -> PtxMachine:
    return PtxMachine(ptx())
