"""The launcher's host code on a stand-in for CUDA's driver: contexts made anew, threads, captures, memory that ran out.

Not yet run on hardware: what a real driver does in these situations is what NVIDIA's documentation says.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from emulator.build import ROOT

SCENARIOS = [
    "made_anew", "tested_again", "no_memory", "two_contexts", "two_threads", "many_threads", "capture", "no_context",
]  # fmt: skip


@pytest.fixture(scope="module", params=["with ids of contexts", "without"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `libcuda.so.1`, the stand-in, and `check_driver`."""
    folder = tmp_path_factory.mktemp("driver")
    compiler = [os.environ.get("CXX", "g++"), "-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
    without = ["-DSTANDIN_WITHOUT_IDS"] if request.param == "without" else []
    library, program = folder / "libcuda.so.1", folder / "check_driver"
    sources = [ROOT / "tests/check_driver.cpp", ROOT / "host/driver.cpp"]
    standin = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *without, str(ROOT / "tests/standin_driver.cpp")]
    subprocess.run([*compiler, *standin, "-o", str(library)], check=True)
    subprocess.run([*compiler, *map(str, sources), str(library), "-ldl", "-o", str(program)], check=True)
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(built: Path, scenario: str) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(built)}
    command = [str(built / "check_driver"), scenario]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
