"""The vision encoder alone, inside a budget, from the command line to the engine's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import SHORT, Run
from tests.small_vlm import write_small_vlm


@pytest.mark.slow
def test_every_stage_of_a_vision_encoder_in_a_budget(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.validate.run.measure_latency", lambda *_, **__: [])
    model = write_small_vlm(tmp_path / "model")
    out = tmp_path / "out"
    for words in (
        ["quantize", model, "-o", out / "checkpoint", "--modules", "visual", "--bits", "4.5", *SHORT],
        ["export", out, "-o", out / "onnx"],
        ["build", out, "-o", out / "engines" / "cpu"],
        ["validate", model, out, "-o", out / "report.json", "--limit", "4"],
    ):
        outcome = cli(*words)
        assert outcome.code == 0, outcome.err
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert {layer["group"] for layer in report["layers"]} == {"visual"}
    assert 4.3 < report["bits"]["total"]["stored_bits"] <= 4.5
    assert report["engine"]["same_answers"] == 1
    assert report["engine"]["logits_error"] < 1e-3
    assert [(target["name"], target["validated"]) for target in report["targets"]] == [("cpu", True)]
