"""Tests of the C++ library: built programs against Python. `runtime/check.sh` builds the programs and runs these."""

from pathlib import Path

import onnxruntime as ort
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--build FOLDER`: where CMake built the programs; `--folder FOLDER`: the demo, exported."""
    parser.addoption("--build", type=Path, required=True, help="CMake's build folder with QE_EDGE_TESTS")
    parser.addoption("--folder", type=Path, required=True, help="The demo's ONNX folder")


@pytest.fixture(scope="session")
def build(request: pytest.FixtureRequest) -> Path:
    """Folder of the built programs."""
    return Path(request.config.getoption("--build")).resolve()


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    """The demo's ONNX folder."""
    return Path(request.config.getoption("--folder")).resolve()


@pytest.fixture(scope="session")
def onnxruntime() -> Path:
    """The library inside Python's package."""
    (library,) = (Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*")
    return library
