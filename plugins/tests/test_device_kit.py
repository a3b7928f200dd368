"""The device kit, as far as a machine without a GPU can run it: its peer's engines, and the file that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from device import check, int4
from emulator.plan import Launch, Planner
from emulator.source import SourceMachine
from tests.modes import MODES


def test_tensorrt_builds_its_own_int4_product() -> None:
    """The engine's size tells that the weight stays INT4."""
    k, n = 512, 2048
    engine = int4.build("tensorrt_rtx", int4.weight_only_model(k, n), k, 16, capability="SM89")
    assert k * n / 2 < len(engine) < k * n


def test_a_product_that_tensorrt_refuses() -> None:
    with pytest.raises(int4.Int4Error, match=r"(?i)parse|model"):
        int4.build("tensorrt_rtx", b"no model", 128, 1, capability="SM89")


class PretendedGpu:
    """The source emulator under the interface of the GPU; times are made up."""

    name, capability, cuda = "pretended GPU", (8, 7), 12060

    def __init__(self, machine: SourceMachine) -> None:
        self.machine = machine

    def add(self, array: NDArray[Any], name: str, *, writable: bool) -> int:
        return self.machine.add(array, name, writable=writable)

    def launch(self, launch: Launch, seed: int) -> list[str]:
        return self.machine.launch(launch, seed)

    def queue(self, launch: Launch) -> None:
        assert launch.name.startswith("qe_")

    def microseconds(self, queue: Any, repeats: int) -> float:  # noqa: ANN401 - any callable
        queue()
        return 10.0

    def clear(self) -> None:
        self.machine.clear()


def test_the_file_has_what_the_report_reads(
    planner: Planner, source_machine: SourceMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = PretendedGpu(source_machine)
    monkeypatch.setattr(check, "DeviceMachine", lambda _folder: gpu)
    monkeypatch.setattr(check, "MODES", MODES[:1])
    monkeypatch.setattr(check, "TOKENS", [7])
    monkeypatch.setattr(check, "SHAPES", {"small": [(256, 64)]})
    monkeypatch.setattr(int4, "library", lambda: None)
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path / "device.json")])
    assert check.main() == 0
    data = json.loads((tmp_path / "device.json").read_text(encoding="utf-8"))
    assert data["kind"] == "qe_edge.device_check"
    assert [row["passed"] for row in data["numerics"]] == [True]
    assert {row["mode"] for row in data["timings"]} == {mode.name for mode in check.TIMED}
    assert {row["tokens"] for row in data["timings"]} == {1, 8, 64, 1024}
    assert "not installed" in data["skipped"]["TensorRT's INT4 weight-only product"]
    assert data["tensorrt_int4"] == []
    # the report's own test reads a file of the same form: tests/report/device.json
    stored = json.loads((Path(__file__).parents[2] / "tests/report/device.json").read_text(encoding="utf-8"))
    for part in ("numerics", "timings"):
        assert data[part][0].keys() == stored[part][0].keys()
    assert data.keys() == stored.keys()


def test_a_wrong_result_is_told(
    planner: Planner, source_machine: SourceMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(check, "DeviceMachine", lambda _folder: PretendedGpu(source_machine))
    monkeypatch.setattr(check, "MODES", MODES[:1])
    monkeypatch.setattr(check, "TOKENS", [1])
    monkeypatch.setattr(check, "qe_linear", lambda layer, x, _dtype: np.ones((len(x), layer.out_features)))
    monkeypatch.setattr("sys.argv", ["check", str(tmp_path / "device.json"), "--quick"])
    assert check.main() == 1
    assert "wrong:" in capsys.readouterr().out
