"""The launcher and the plugin class on a stand-in for CUDA's driver.

Contexts that are made anew, threads, captures, memory that ran out, overlapping launches, what an enqueue asks for.

Not yet run on hardware: what a real driver does in these situations is what NVIDIA's documentation says.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from emulator.build import ROOT

SCENARIOS = [
    "made_anew", "tested_again", "no_memory", "two_contexts", "destroyed", "two_threads", "loads_aside", "many_threads",
    "capture", "no_context", "steady", "overlaps", "counters", "clusters",
    "clusters_of_contexts",
]  # fmt: skip


COMPILER = [os.environ.get("CXX", "g++"), "-std=c++17", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
LAUNCHER = [str(ROOT / "host/driver.cpp"), str(ROOT / "host/contexts.cpp")]


@pytest.fixture(scope="module", params=["with ids of contexts", "without"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`libcuda.so.1`, the stand-in, in a folder of its own."""
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    without = ["-DSTANDIN_WITHOUT_IDS"] if request.param == "without" else []
    standin = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", *without, str(ROOT / "tests/standin_driver.cpp")]
    subprocess.run([*COMPILER, *standin, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def check_driver(driver: Path) -> Path:
    program = driver.with_name("check_driver")
    sources = [str(ROOT / "tests/check_driver.cpp"), *LAUNCHER, str(driver)]
    subprocess.run([*COMPILER, *sources, "-Wl,--wrap=pthread_mutex_lock", "-ldl", "-o", str(program)], check=True)
    return program


def run(program: Path, *arguments: str) -> str:
    """Expect success and nothing on standard output; returns standard error."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent)}
    command = [str(program), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(check_driver: Path, scenario: str) -> None:
    run(check_driver, scenario)


def test_single_layers(driver: Path) -> None:
    """The functions that PyTorch calls: include/qe_edge/layer.h."""
    program = driver.with_name("check_layer")
    sources = [
        str(ROOT / name) for name in ("tests/check_layer.cpp", "host/layer.cpp", "host/attributes.cpp", "host/plan.cpp")
    ]
    subprocess.run([*COMPILER, *sources, *LAUNCHER, str(driver), "-ldl", "-o", str(program)], check=True)
    assert run(program) == ""


def test_plugin(driver: Path) -> None:
    cache = ROOT / "build/plugin/CMakeCache.txt"
    assert cache.exists(), f"{cache} is missing. Run plugins/ladder.sh, which builds the plugin."
    headers = re.findall(r"^QE_(?:TENSORRT_FOUND|CUDA_INCLUDE):PATH=(.+)$", cache.read_text(), re.MULTILINE)
    program = driver.with_name("check_plugin")
    names = ("host/attributes.cpp", "host/plan.cpp", "host/signature.cpp", "tensorrt/fields.cpp", "tensorrt/log.cpp",
             "tensorrt/qe_linear_plugin.cpp")  # fmt: skip
    sources = [ROOT / "tests/check_plugin.cpp", *(ROOT / name for name in names)]
    includes = [word for folder in headers for word in ("-isystem", folder)]
    subprocess.run(
        [*COMPILER, *includes, *map(str, sources), *LAUNCHER, str(driver), "-ldl", "-o", str(program)], check=True
    )
    errors = run(program).splitlines()  # that there is no context, and the warning
    assert ["no GPU memory for a layer's counters" in line for line in errors] == [False, True], errors
