"""The whole validation of a checkpoint without an engine, and what it says about missing parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qe_edge.checkpoint import RECIPE, load_quantized
from qe_edge.errors import ArtifactError, CalibrationError
from qe_edge.progress import Silent
from qe_edge.validate import Report, validate
from qe_edge.validate.run import LIMITED, NO_CALIBRATION


class Counting(Silent):
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.total = 0.0
        self.done = 0.0

    def start(self, title: str, total: float) -> None:
        self.total += total

    def advance(self, amount: float, note: str) -> None:
        self.done += amount


def test_a_report_without_an_engine(small: Path, checkpoint: Path) -> None:
    progress = Counting()
    report = validate(str(small), checkpoint, None, "demo", limit=6, progress=progress)
    assert progress.done == progress.total > 0
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert [row.role for row in report.contenders] == ["original", "quantized"]
    assert report.contenders[0].text_tokens is None
    distance = report.contenders[1].text_tokens
    assert distance is not None
    assert distance.kl is not None
    assert 0 < distance.kl < 1
    assert report.evaluation.samples == 6
    assert report.notes == [LIMITED.format(count=6)]
    assert report.latency == []
    assert report.engine is None
    assert all(layer.calibration is not None for layer in report.layers)
    assert {file.stage for file in report.sizes} == {"original", "checkpoint"}
    assert report.recipe["calibration"]["samples"] == 4
    assert len(report.examples) == 6
    assert report.model == small.name


def test_other_calibration_data_are_not_passed_off_as_the_original(
    small: Path, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    recipe = json.loads((copy / RECIPE).read_text(encoding="utf-8"))
    recipe["calibration"]["sha256"] = "0" * 64
    (copy / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    report = validate(str(small), copy, None, "demo", limit=2)
    assert NO_CALIBRATION in report.notes
    assert all(layer.calibration is None for layer in report.layers)


def test_every_end_token_of_the_original_survives(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    path = copy / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "eos_token_id": [2, 5]}), encoding="utf-8")
    generation = load_quantized(copy).model.generation_config
    assert generation.eos_token_id == [2, 5]  # type: ignore[union-attr]
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="generation_config"):
        load_quantized(copy)


def test_no_question_at_all(small: Path, checkpoint: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no question"):
        validate(str(small), checkpoint, None, "demo", limit=0)
