"""Every command finds its input in the output of any stage that holds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qe_edge.cli import inputs
from qe_edge.system.errors import ArtifactError, InputError, ModelError, UnknownNameError


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "qwen2_vl", "quantization_config": {"quant_method": "qe-edge"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_manifest(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What `deploy` leaves behind."""
    make_checkpoint(tmp_path / "out" / "checkpoint")
    make_manifest(tmp_path / "out" / "onnx")
    make_manifest(tmp_path / "out" / "engines" / "cpu")
    make_manifest(tmp_path / "out" / "engines" / "rtx")
    (tmp_path / "out" / "report.json").write_text("{}")
    return tmp_path / "out"


def test_the_output_of_deploy_holds_everything(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "runs_here", lambda name: name == "rtx")
    assert inputs.find_checkpoint(out) == out / "checkpoint"
    assert inputs.find_onnx(out) == out / "onnx"
    assert inputs.find_engines(out) == out / "engines" / "rtx"
    assert inputs.find_engines(out, "cpu") == out / "engines" / "cpu"
    assert inputs.find_engines(out / "engines") == out / "engines" / "rtx"
    assert inputs.find_runnable(out) == out / "engines" / "rtx"
    assert inputs.find_report(out) == out / "report.json"


def test_each_stage_is_found_at_its_own_folder(out: Path) -> None:
    assert inputs.find_checkpoint(out / "checkpoint") == out / "checkpoint"
    assert inputs.find_onnx(out / "onnx") == out / "onnx"
    assert inputs.find_engines(out / "engines" / "cpu") == out / "engines" / "cpu"
    for folder in (out / "checkpoint", out / "onnx", out / "engines" / "cpu"):
        assert inputs.find_runnable(folder) == folder
    assert inputs.find_report(out / "report.json") == out / "report.json"


def test_without_engines_the_graphs_run_and_without_these_the_checkpoint(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    assert inputs.find_runnable(tmp_path) == tmp_path / "checkpoint"
    make_manifest(tmp_path / "onnx")
    assert inputs.find_runnable(tmp_path) == tmp_path / "onnx"


def test_if_no_engine_runs_here_the_first_one_says_why(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "runs_here", lambda _name: False)
    assert inputs.find_engines(out) == out / "engines" / "cpu"


def test_what_is_not_there_is_said_with_the_command_that_makes_it(out: Path, tmp_path: Path) -> None:
    for find, made_by in (
        (inputs.find_checkpoint, "qe-edge quantize"),
        (inputs.find_onnx, "qe-edge export"),
        (inputs.find_engines, "qe-edge build"),
        (inputs.find_runnable, "qe-edge build"),
        (inputs.find_report, "qe-edge validate"),
    ):
        with pytest.raises(ArtifactError) as caught:
            find(tmp_path / "nosuch")
        assert "There is no" in caught.value.problem
        assert made_by in caught.value.remedy
    with pytest.raises(ArtifactError, match="holds no quantized checkpoint"):
        inputs.find_checkpoint(out / "onnx")
    with pytest.raises(UnknownNameError, match="Did you mean 'rtx'"):
        inputs.find_engines(out, "rtxx")
    with pytest.raises(InputError, match="Leave --target out"):
        inputs.find_engines(out / "engines" / "cpu", "rtx")


def test_an_original_model_is_not_a_deployment(out: Path) -> None:
    with pytest.raises(ModelError, match="quantized already"):
        inputs.open_model(str(out))
