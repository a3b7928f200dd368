"""The device kit on a stand-in for CUDA's driver whose GPU is the source emulator, from the command to its file."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device import cases, check, correctness, layers, markdown, peers, shapes, tensorrt_int4, timing
from device.chip import chip
from device.driver import DeviceError, Driver
from device.gpu import Gpu
from emulator.build import ROOT, plan_library, source_emulator
from emulator.plan import Launch, Planner
from emulator.session import WEIGHTS
from prepack.pack import pack
from tests.cases import Mode, random_layer
from tests.modes import MODES
from tests.peers_on_cpu import SMALL

STORED = ROOT.parent / "tests/report/device.json"
CPU_PEERS = (sys.executable, "-m", "tests.peers_on_cpu")


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> str:
    library = tmp_path_factory.mktemp("gpu") / "libcuda.so.1"
    options = ["-std=c++17", "-shared", "-cudart", "none", "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror"]
    emulator = f'-DSTANDIN_EMULATOR="{source_emulator()}"'
    subprocess.run(
        ["nvcc", *options, emulator, "-o", str(library), str(ROOT / "tests/standin_gpu.cpp"), "-ldl"], check=True
    )
    return str(library)


@pytest.fixture(scope="session")
def gpu(libcuda: str) -> Gpu:
    return Gpu(b"kernels", Driver(libcuda))


@pytest.fixture
def small_kit(libcuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`check.main` with few and small layers; returns the file that it writes."""
    kernels = tmp_path / "kernels.cubin"
    kernels.write_bytes(b"kernels")
    monkeypatch.setattr(check, "LIBRARY", libcuda)
    monkeypatch.setattr(check, "run_peers", lambda *a: peers.run_peers(a[0], a[1], a[2], CPU_PEERS))
    monkeypatch.setattr(cases, "MODES", MODES[:1])
    monkeypatch.setattr(cases, "COMBINATIONS", [])
    monkeypatch.setattr(cases, "TOKENS", [1, 65])
    monkeypatch.setattr(cases, "REAL_MODES", MODES[11:12])
    monkeypatch.setattr(cases, "REAL_SIZES", [(256, 136)])
    monkeypatch.setattr(cases, "REAL_TOKENS", (3,))
    monkeypatch.setattr(check, "COMBINATIONS", [])
    monkeypatch.setattr(shapes, "MODELS", SMALL)
    monkeypatch.setattr(shapes, "BLOCKS", 2)
    monkeypatch.setattr(shapes, "TOKENS", (1, 17, 256))
    monkeypatch.setattr(shapes, "STEP_TOKENS", (1,))
    monkeypatch.setattr(shapes, "MOST_COPIES", 2)
    monkeypatch.setattr(layers, "POOL", 1 << 16)
    monkeypatch.setattr(layers.RandomMemory, "ROOM", 2 << 16)
    monkeypatch.setattr(timing, "COPIED", 1 << 12)
    short = Gpu.graph_time
    monkeypatch.setattr(Gpu, "graph_time", lambda self, queue: short(self, queue, 1, 0))
    out = tmp_path / "device.json"
    monkeypatch.setattr(
        "sys.argv", ["check", str(out), "--kernels", str(kernels), "--commit", "abc", "--seconds", "60"]
    )
    return out


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def test_the_command_fills_every_field(small_kit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    assert check.main() == 0
    data = read(small_kit)
    assert [key for key, value in data.items() if value in (None, "", [], {}, 0)] == ["failures"]
    assert data["device"] == "emulated GPU"
    assert data["overlaps"]
    assert all(row["passed"] for row in data["numerics"])
    assert {row["tokens"] for row in data["numerics"]} == {1, 3, 65}
    assert {row["mode"] for row in data["linears"]} == {row["mode"] for row in data["steps"]}
    assert {row["mode"] for row in data["steps"]} == {way.name for way in shapes.WAYS}
    assert {(row["tokens"], row["block_rows"]) for row in data["linears"]} == {(1, 0), (17, 0), (256, 0), (256, 128)}
    ranked = [row for row in data["linears"] if row["mode"] == "w4a8, 64 in INT4" and row["tokens"] == 256]
    assert [row["launches"] for row in ranked] == [2, 1, 2]
    for row in (*data["linears"], *data["steps"], *data["peer_linears"], *data["peer_steps"]):
        whole = row.get("launches") == row.get("of_launches", row.get("launches"))
        assert (row["times_float16"] is not None) == whole, row
        assert min(row["microseconds"], row["bytes"]) > 0
    assert {row["peer"] for row in data["peer_linears"]} >= {"cuBLAS FP16", "cuBLAS INT8"}
    assert "not installed" in data["skipped"][tensorrt_int4.NAME]
    printed = capsys.readouterr().out
    for expected in ("emulated GPU: ", "step, us", "layer, x FP16", "w4a8, 64 in INT4", "not measured"):
        assert expected in printed
    page = markdown.results(markdown.read(small_kit))
    assert "| w4a8, 64 in INT4 |" in page
    assert "commit abc: " in page
    # the report's own test reads a file of the same form; a run from before there were clusters does not name them
    stored = read(STORED)
    assert data.keys() == stored.keys()
    for part in ("numerics", "linears", "steps", "peer_linears", "peer_steps"):
        assert data[part][0].keys() - stored[part][0].keys() <= {"clusters"}, part
        assert data[part][0].keys() >= stored[part][0].keys(), part


def test_a_wrong_result_is_told(
    small_kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "qe_linear", lambda layer, x, _dtype: np.ones((len(x), layer.out_features)))
    monkeypatch.setattr("sys.argv", [*sys.argv, "--quick"])
    assert check.main() == 1
    assert "wrong: " in capsys.readouterr().out
    assert not any(row["passed"] for row in read(small_kit)["numerics"])


def test_a_launch_that_fails_is_told(
    small_kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STANDIN_FAIL", "1")
    monkeypatch.setattr("sys.argv", [*sys.argv, "--quick"])
    assert check.main() == 1
    assert "failed: cuLaunchKernel" in capsys.readouterr().out
    assert read(small_kit)["failures"]


def test_without_a_driver(small_kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "LIBRARY", "libno-cuda.so.1")
    assert check.main() == 1
    assert "There is no CUDA driver." in capsys.readouterr().err
    assert not small_kit.exists()


REQUEST = cases.Request(MODES[0], 264, 40, (3,), 1, real=False)


@pytest.mark.parametrize("where", ["y", "behind y", "behind the workspace", "counters", "second run"])
def test_what_a_kernel_writes_wrongly_is_noticed(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    planner, case = Planner.load(plan_library()), cases.prepare(REQUEST)
    problem, y_bytes = case.problem(3), 2 * 3 * 40
    seen: dict[str, Any] = {"runs": 0}

    class Spy:
        """Hands the plan on and remembers where its buffers are."""

        workspace_bytes, counter_bytes = planner.workspace_bytes, planner.counter_bytes

        def launches(self, problem: Any, buffers: Any, tactic: Any) -> list[Launch]:  # noqa: ANN401
            seen.update(buffers=buffers, runs=seen["runs"] + 1)
            return planner.launches(problem, buffers, tactic)

    def spoil(launch: Launch) -> None:
        Gpu.launch(gpu, launch)
        b = seen["buffers"]
        place = {
            "y": b.y, "second run": b.y, "behind y": b.y + y_bytes, "counters": b.counters,
            "behind the workspace": b.workspace + planner.workspace_bytes(problem),
        }[where]  # fmt: skip
        if "decode" in launch.name and (where != "second run" or seen["runs"] == 2):
            gpu.fill(place, 0x3C, 2)

    monkeypatch.setattr(gpu, "launch", spoil)
    result = next(correctness.Checker(gpu, Spy()).check(case))  # type: ignore[arg-type] # a spy of the planner
    assert not result.passed
    assert result.in_bounds == (not where.startswith("behind"))
    assert result.counters_zero == (where != "counters")
    assert result.same_bits == (where != "second run")


def test_a_right_result(gpu: Gpu) -> None:
    found = list(correctness.Checker(gpu, Planner.load(plan_library())).check(cases.prepare(REQUEST)))
    assert [(result.multiprocessors > 0, result.clusters) for result in found] == [(False, 0), (True, 0), (True, 1)]
    assert all(result.passed for result in found)


def test_tokens_with_equal_scores_may_go_either_way() -> None:
    reference = np.ones((4, 8))
    y = np.ones((4, 8), np.float32)
    y[2] = 5
    assert correctness.error_of(y, reference, np.array([False, False, True, False])) == (0.0, 1)
    error, rerouted = correctness.error_of(y, reference, np.zeros(4, bool))
    assert error > 1
    assert rerouted == 0
    y[0, 0] = np.nan
    assert correctness.error_of(y, reference, np.ones(4, bool)) == (float("inf"), 0)


@pytest.mark.parametrize("way", shapes.WAYS, ids=lambda way: way.name)
def test_timed_layers_are_as_large_as_packed_ones(way: shapes.Way) -> None:
    k, n = 384, 136
    mode = Mode(
        way.name, way.act_bits, way.group_size, way.zeros, way.weight_bits, "f16", way.adapter_bits, way.rank_shared,
        way.rank_routed, way.experts, way.inv_omega,
    )  # fmt: skip
    packed = pack(random_layer(mode, k, n), "f16")
    arrays = {name: getattr(packed, name) for name in WEIGHTS}
    expected = {name: array.nbytes for name, array in arrays.items() if array is not None}
    sizes = layers.Shape(k, n, way).sizes
    assert sizes == expected | {name: size for name, size in sizes.items() if name == "down_scale"}
    assert {name: array.nbytes for name, array in layers.small_tensors(layers.Shape(k, n, way)).items()}.items() <= (
        sizes.items()
    )


def test_counters_that_are_left_are_an_error(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = timing.Stopwatch(gpu, Planner.load(plan_library()))
    monkeypatch.setattr(gpu, "read", lambda _address, size: np.ones(size, np.uint8))
    monkeypatch.setattr(gpu, "graph_time", lambda _queue: 1.0)
    with pytest.raises(timing.CounterError, match="w4a8"):
        watch.linear(layers.Shape(256, 64, shapes.WAYS[0]), 1)


def test_too_little_memory_is_a_reason(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MODELS", {"large": [(1 << 16, 1 << 16)]})
    watch = timing.Stopwatch(gpu, Planner.load(plan_library()))
    rows = [*timing.step_rows(watch, float("inf")), *timing.step_rows(watch, 0.0)]
    assert {row["skipped"] for row in rows} == {"The GPU has too little memory.", "The time was up."}


def test_the_chip_that_kernels_are_assembled_for(libcuda: str) -> None:
    assert chip(Driver(libcuda)) == 90


def test_the_driver_names_what_failed(libcuda: str) -> None:
    with pytest.raises(DeviceError, match="cuMemFree failed with CUDA error 1"):
        Driver(libcuda).call("cuMemFree", 1)


STAGES = """
import json, os, sys, time
out = open(sys.argv[sys.argv.index("--out") + 1], "a")
def say(**row): out.write(json.dumps(row) + "\\n"); out.flush()
for name in sys.argv[sys.argv.index("--seconds") + 2:]:
    say(start=name)
    say(peer=name, model="m", k=1, n=1, tokens=1, microseconds=1.0)
    if name == "crashes": os.abort()
    if name == "fails": sys.exit("no such kernel")
    if name == "hangs": time.sleep(60)
    say(done=name)
"""


def test_a_peer_that_crashes_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "GRACE", 1.0)
    names = ["first", "crashes", "fails", "hangs", "last"]
    found = peers.run_peers(names, 1, 1.0, (sys.executable, "-c", STAGES))
    assert [row["peer"] for row in found.linears] == names
    assert found.skipped["crashes"].startswith("its process ended with code -6")
    assert found.skipped["fails"].endswith("code 1. no such kernel")
    assert "stopped" in found.skipped["hangs"]
    assert found.skipped.keys() == {"crashes", "fails", "hangs"}


def test_peers_that_cannot_start() -> None:
    found = peers.run_peers(["one", "two"], 1, 1.0, (sys.executable, "-c", "raise SystemExit('no torch here')"))
    assert found.skipped == dict.fromkeys(["one", "two"], "its process ended with code 1. no torch here")


def test_half_a_line_is_no_row() -> None:
    assert peers._complete_rows('{"a": 1}\n{"b"') == [{"a": 1}]


def test_the_folder_of_the_plugin_classes_is_not_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pretended_tensorrt").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tensorrt_int4, "MODULES", ("pretended_tensorrt",))
    assert tensorrt_int4.library() is None
    (tmp_path / "pretended_tensorrt/__init__.py").touch()
    importlib.invalidate_caches()
    assert tensorrt_int4.library() == "pretended_tensorrt"


def test_the_kernels_alone_need_no_tensorrt(tmp_path: Path) -> None:
    options = ["-DQE_PAYLOAD_ONLY=ON", "-DQE_CHIPS=90", "-DQE_CHIPS12=90"]
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "QE_TENSORRT_FOUND" not in (tmp_path / "CMakeCache.txt").read_text()


def test_tensorrt_builds_its_own_int4_product() -> None:
    """The engine's size tells that the weight stays INT4."""
    k, n = 512, 2048
    pytest.importorskip("tensorrt_rtx")
    engine = tensorrt_int4.build("tensorrt_rtx", tensorrt_int4.weight_only_model(k, n), k, 16, capability="SM89")
    assert k * n / 2 < len(engine) < k * n


def test_a_product_that_tensorrt_refuses() -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(tensorrt_int4.Int4Error, match=r"(?i)parse|model"):
        tensorrt_int4.build("tensorrt_rtx", b"no model", 128, 1, capability="SM89")
