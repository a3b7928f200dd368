"""The diagnosis finds what is there, survives what is broken, and says what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qe_edge import doctor
from qe_edge.doctor import MISSING, OK, WRONG, Diagnosis, Finding
from tests.cli.running import Run


def test_this_machine_is_healthy(cli: Run) -> None:
    outcome = cli("doctor", "--json")
    assert outcome.code == 0, outcome.err
    values = json.loads(outcome.out)
    found = {(item["group"], item["name"]): item for item in values["findings"]}
    assert values["healthy"] is True
    assert found["Packages", "torch"]["state"] == OK
    assert "CPUExecutionProvider" in found["Runtimes", "ONNX Runtime"]["detail"]
    assert found["Machine", "BLAS"]["detail"] != "unknown"
    for group, name in (("Machine", "Memory"), ("Machine", "Disk"), ("GPU", "CUDA device"), ("Targets", "cpu")):
        assert (group, name) in found
    for item in values["findings"]:
        assert item["state"] == OK or item["remedy"], item


def test_the_table_shows_every_finding(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [
        Finding("Packages", "torch", WRONG, "1.0 is outside >=2.6", 'Run: pip install "torch>=2.6"'),
        Finding("GPU", "nvcc", MISSING, "not found", "Install it."),
    ]
    monkeypatch.setattr(doctor, "examine", lambda: Diagnosis(findings))
    outcome = cli("doctor")
    assert 'WRONG   1.0 is outside >=2.6   Run: pip install "torch>=2.6"' in outcome.out
    assert "nvcc" in outcome.out
    assert "cannot work here until what is WRONG is mended" in outcome.out


def test_a_package_that_is_too_old_or_missing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=999", "nosuchpackage>=1", 'tensorrt-rtx>=999; extra == "rtx"', 'pytest>=1; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _name: wanted)
    found = {item.name: item for item in doctor._packages()}
    assert found["torch"].state == WRONG
    assert 'pip install "torch>=999"' in found["torch"].remedy
    assert found["nosuchpackage"].state == WRONG
    assert "pytest" not in found


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "exit code -6"),
        ("raise ImportError('libcuda.so.1 is missing')", "libcuda.so.1 is missing"),
        ("print('no json')", "cannot be imported"),
        ("import time; time.sleep(60)", "does not answer"),
    ],
)
def test_a_library_that_crashes_or_hangs_costs_one_line(
    monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 2)
    seen = {"tensorrt": doctor._result(doctor._start(code))}
    found = {item.name: item for item in doctor._runtimes(seen)}
    assert reason in found["TensorRT"].detail
    assert found["TensorRT"].state == MISSING


def test_a_section_that_fails_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no /proc here")

    monkeypatch.setattr(doctor, "PROBES", {})
    monkeypatch.setattr(doctor, "_python", broken)
    findings = doctor.examine().findings
    assert "no /proc here" in findings[0].detail
    assert any(item.name == "Memory" for item in findings)


def test_an_unsupported_python_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 0))
    (finding,) = doctor._python()
    assert (finding.state, finding.remedy) == (WRONG, "Use Python 3.10, 3.11, 3.12 or 3.13.")


def test_the_plugin_is_looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QE_EDGE_PLUGIN_LIBRARY", str(tmp_path / "libqe_plugin.so"))
    finding = doctor._plugin()
    assert finding.state == MISSING
    assert "qe-edge build-plugin" in finding.remedy
    (tmp_path / "libqe_plugin.so").touch()
    assert doctor._plugin().state == OK
    finding = doctor._operator()
    assert finding.state == MISSING
    assert finding.detail == "The plugin library has no libqe_ort.so beside it, which ONNX Runtime needs."
    assert finding.remedy == "Only for the target cuda: Build both anew with 'qe-edge build-plugin'."
    (tmp_path / "libqe_ort.so").touch()
    assert doctor._operator().state == OK


def test_a_jetson_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    release = "# R36 (release), REVISION: 4.0"
    monkeypatch.setattr(doctor, "_first_line", lambda path: release if path == Path("/etc/nv_tegra_release") else None)
    monkeypatch.setattr(doctor, "_output", lambda _command: None)
    device = {"name": "Orin", "capability": "87", "memory": 2**33}
    found = {item.name: item for item in doctor._gpu({"torch": {"cuda": "12.6", "devices": [device]}})}
    assert found["Jetson"].detail == release
    assert found["CUDA device"].detail == "Orin, sm_87, 8.0 GiB"
    assert found["nvcc"].state == MISSING


@pytest.mark.parametrize(("value", "detail"), [(None, "off"), ("1", "off"), ("0", "on, as ORT_DISABLE_TELEMETRY says")])
def test_whether_onnx_runtime_reports_home(monkeypatch: pytest.MonkeyPatch, value: str | None, detail: str) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    if value is not None:
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", value)
    found = {item.name: item for item in doctor._runtimes({"onnxruntime": {"providers": []}})}
    assert found["ORT telemetry"].detail.startswith(detail)
