from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest

from tests.models.test_decoders import export_of

StateExports = Callable[[str], Path]


@pytest.fixture(scope="session")
def state_exports(tmp_path_factory: pytest.TempPathFactory) -> StateExports:
    """By its name in `test_decoders.MODELS` the folder of a model whose layers keep states, with its graph."""

    @lru_cache
    def make(name: str) -> Path:
        return export_of(name, tmp_path_factory.mktemp("states"))

    return make
