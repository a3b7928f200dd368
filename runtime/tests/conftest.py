"""Tests of the C++ library: built programs against Python. `runtime/check.sh` builds the programs and runs these."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--build FOLDER`: where CMake built the programs."""
    parser.addoption("--build", type=Path, required=True, help="CMake's build folder with QE_EDGE_TESTS")


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Path:
    """Folder of the built programs."""
    return Path(request.config.getoption("--build")).resolve()
