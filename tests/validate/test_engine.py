"""A real engine against PyTorch, and speed measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qe_edge.models.family import Sample
from qe_edge.system.errors import ArtifactError, ResourceError
from qe_edge.validate import validate
from qe_edge.validate.energy import NO_RAILS
from qe_edge.validate.latency import Measurement, _in_child, measure_latency
from tests.conftest import Exported
from tests.system.test_power import ORIN_NX, monitor

STEPS = ["encode", "visual", "merger", "prefill"]


@pytest.mark.slow
def test_a_report_with_an_engine(small: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.validate.run.measure_latency", partial(measure_latency, seconds=0))
    report = validate(str(small), exported.checkpoint, exported.onnx, "demo", onnx=exported.onnx, limit=10)
    assert report.engine is not None
    assert report.engine.same_answers == 1
    assert report.engine.logits_error < 1e-3
    engine, quantized = report.contender("engine"), report.contender("quantized")
    assert engine is not None
    assert quantized is not None
    assert engine.accuracy == quantized.accuracy
    assert engine.size == sum(path.stat().st_size for path in exported.onnx.iterdir())
    assert [row.setting for row in report.latency] == ["accuracy level 0", "accuracy level 4", "float32"]
    assert [target.validated for target in report.targets] == [True]
    for row in report.latency[:2]:
        # each repeat's first token contains its parts, so the medians are ordered on a busy machine too
        assert row.steps["first_token"].median >= max(row.steps[step].median for step in STEPS)
        assert row.steps["decode"].repeats == 8 * row.steps["prefill"].repeats
    assert {"first_token", "decode"} == set(report.latency[2].steps)


@pytest.mark.slow
def test_the_peak_is_the_childs_own(exported: Exported, held_out: list[Sample]) -> None:
    ballast = np.ones(1 << 28)  # 2 GiB that the child must not inherit
    found = measure_latency(exported.onnx, held_out[0], seconds=0)
    assert ballast[-1] == 1
    assert all(100e6 < row.peak_bytes < 1.5e9 for row in found)


@pytest.mark.slow
def test_a_child_measures_the_energy_of_answers(exported: Exported, tmp_path: Path) -> None:
    monitor(tmp_path, ORIN_NX)  # always 6 W
    asked = Measurement("onnxruntime", "", str(exported.onnx), 0, 1, "is it?", (), system=str(tmp_path))
    row = _in_child(asked)
    energy = row.measured_energy
    assert energy is not None
    assert energy.answers == row.steps["first_token"].repeats
    assert energy.idle_watts == pytest.approx(6.0)
    assert energy.above_idle == pytest.approx(0.0, abs=1e-6)
    spent = row.steps["first_token"].lower + 8 * row.steps["decode"].lower  # milliseconds of an answer, or fewer
    assert energy.joules > 0.5 * 6.0 * spent / 1000
    assert _in_child(replace(asked, system=str(tmp_path / "desktop"))).energy == NO_RAILS


def test_what_a_child_refuses_is_said_as_it_said_it(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not an ONNX or engine folder: manifest\.json"):
        measure_latency(tmp_path, Sample(None, "is it?"))


def test_a_child_that_dies_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.validate.latency.CHILD", "os.path.nothing")
    with pytest.raises(ResourceError, match=r"ended with code .*nothing") as refused:
        measure_latency(tmp_path, Sample(None, "is it?"))
    assert "repeat the command" in refused.value.remedy


def test_the_measuring_child_starts_without_torch() -> None:
    code = "import sys, qe_edge.validate.latency_child; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
