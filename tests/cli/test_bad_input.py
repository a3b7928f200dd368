"""Every mistake that a user can make gets two short lines, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from qe_edge.cli import outputs
from tests.cli.running import SHORT, Run, assert_two_lines


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "checkpoint"


def assert_nothing_written(out: Path) -> None:
    """Neither the output nor a work folder nor a temporary file."""
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_missing_model_folder(cli: Run, out: Path, tmp_path: Path) -> None:
    assert_two_lines(cli("quantize", tmp_path / "nosuch", "-o", out), "There is no model folder", "or 'demo'")
    assert_nothing_written(out)


def test_a_misspelt_relative_path_is_not_looked_up_in_the_hub(
    cli: Run, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert_two_lines(cli("quantize", "models/nosuch", "-o", out), "no model folder 'models/nosuch'", "config.json")


def test_a_model_of_another_kind(cli: Run, out: Path, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    assert_two_lines(cli("quantize", model, "-o", out), "is a 'bert' model, which QE-Edge does not support", "qwen2_vl")
    assert_nothing_written(out)


def test_a_folder_without_configuration(cli: Run, out: Path, tmp_path: Path) -> None:
    assert_two_lines(cli("quantize", tmp_path, "-o", out), "has no config.json", "transformers model")


@pytest.mark.parametrize("size", [4, 1000, -1000])
def test_truncated_safetensors(cli: Run, out: Path, model: Path, size: int) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert_two_lines(cli("quantize", model, "-o", out), "is damaged", "Download")
    assert_nothing_written(out)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(cli: Run, out: Path, model: Path, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "layers.2.mlp.up_proj" in name)
    tensors[name][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert_two_lines(cli("quantize", model, "-o", out), "layers.2.mlp.up_proj.weight' hold NaN", "damaged")
    assert_nothing_written(out)


def test_a_quantized_checkpoint_is_not_quantized_again(cli: Run, out: Path, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "qe-edge"}
    (model / "config.json").write_text(json.dumps(config))
    assert_two_lines(cli("quantize", model, "-o", out), "is quantized already", "original model")


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        (["--method", "qee"], "no method 'qee'", "Did you mean 'qe'?"),
        (["--scheme", "w4a9"], "no scheme 'w4a9'", "Did you mean 'w4a8'?"),
        (["--modules", "langage"], "no module 'langage'", "Did you mean 'language'?"),
        (["--modules", ","], "No module is selected", "language"),
        (["--preset", "papr"], "no preset of method qe 'papr'", "Did you mean 'paper'?"),
        (["--set", "expert=4"], "no recipe key 'options.expert'", "Did you mean 'options.experts'?"),
        (["--set", "experts"], "'--set experts' has no value", "KEY=VALUE"),
        (["--set", "experts=[1"], "'--set experts=[1' cannot be read", "number"),
        (["--set", "experts=many"], "'options.experts' is wrong", "Correct the value"),
        (["--set", "experts=-1"], "'options.experts' is wrong", "Correct the value"),
        (["--samples", "0"], "0 is not in the range", "qe-edge quantize --help"),
        (["--shceme", "w4a8"], "no option '--shceme'", "Did you mean '--scheme'?"),
        (["--calibration", "nosuch"], "no calibration source 'nosuch'", "JSONL file"),
        (["--recipe", "nosuch.yaml"], "no recipe file 'nosuch.yaml'", "--recipe"),
    ],
)
def test_unknown_names_and_values(cli: Run, out: Path, words: list[str], problem: str, remedy: str) -> None:
    assert_two_lines(cli("quantize", "demo", "-o", out, *words), problem, remedy)
    assert_nothing_written(out)


def test_unknown_command(cli: Run) -> None:
    assert_two_lines(cli("quantise", "demo"), "There is no command 'quantise'", "Did you mean 'quantize'?")


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("shceme: w4a8", "no recipe key 'shceme'", "Did you mean 'scheme'?"),
        ("calibration: {sampels: 4}", "no recipe key 'calibration.sampels'", "Did you mean 'calibration.samples'?"),
        ("options: {em_step: 1}", "no recipe key 'options.em_step'", "Did you mean 'options.em_steps'?"),
        ("scheme: [w4a8", "is not valid YAML or JSON", "Correct that line"),
        ("w4a8", "holds no recipe", "scheme: w4a8"),
        ("calibration: demo", "'calibration' is wrong", "Correct the value"),
    ],
)
def test_a_recipe_with_a_typo(cli: Run, out: Path, tmp_path: Path, text: str, problem: str, remedy: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert_two_lines(cli("quantize", "demo", "-o", out, "--recipe", recipe, "--samples", "4"), problem, remedy)
    assert_nothing_written(out)


def test_an_image_that_is_no_image(cli: Run, out: Path, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("not a picture")
    lines = tmp_path / "samples.jsonl"
    lines.write_text(json.dumps({"image": "picture.png", "question": "What is this?", "answer": "a cat"}))
    outcome = cli("quantize", "demo", "-o", out, "--calibration", lines)
    assert_two_lines(outcome, "picture.png' is not a picture", "PNG, JPEG or WebP")
    assert_nothing_written(out)


def test_a_calibration_picture_that_is_missing(cli: Run, out: Path, tmp_path: Path) -> None:
    lines = tmp_path / "samples.jsonl"
    lines.write_text(json.dumps({"image": "gone.png", "question": "What is this?"}))
    outcome = cli("quantize", "demo", "-o", out, "--calibration", lines)
    assert_two_lines(outcome, "names the missing picture 'gone.png'", "Add the file")


def test_an_output_folder_in_use(cli: Run, out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("mine")
    assert_two_lines(cli("quantize", "demo", "-o", out), "is not empty", "--overwrite")
    assert_two_lines(cli("quantize", "demo", "-o", out, "--overwrite"), "did not write", "another folder")
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_an_unfinished_run_in_the_way(cli: Run, out: Path) -> None:
    work = out.with_name("checkpoint.work")
    work.mkdir(parents=True)
    (work / "run.json").write_text("{}")
    assert_two_lines(cli("quantize", "demo", "-o", out), "holds an unfinished run", "--resume")
    assert_two_lines(
        cli("quantize", "demo", "-o", out, "--resume", *SHORT), "another model, recipe", "original command"
    )
    assert [path.name for path in work.iterdir()] == ["run.json"]
    quick = ["--method", "rtn", "--modules", "merger", "--samples", "1"]
    assert cli("quantize", "demo", "-o", out, *quick, "--overwrite").code == 0
    assert [path.name for path in out.parent.iterdir()] == ["checkpoint"]


def test_an_output_below_a_file(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_two_lines(cli("quantize", "demo", "-o", tmp_path / "file" / "x"), "is a file", "another name")
    assert_two_lines(cli("quantize", "demo", "-o", tmp_path / "file"), "is a file", "another name")


def test_an_output_that_may_not_be_written(cli: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the system's answer is replaced
    monkeypatch.setattr(outputs.os, "access", lambda *_arguments: False)
    assert_two_lines(cli("quantize", "demo", "-o", out), "is not writable", "another folder")


def test_too_little_disk(cli: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = outputs.shutil.disk_usage(out.parent.parent)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _path: usage._replace(free=2**20))
    assert_two_lines(cli("quantize", "demo", "-o", out), "and 1.0 MiB are free", "another disk")
    assert_nothing_written(out)


def test_a_module_that_the_model_lacks(cli: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qe_edge.models.qwen2_vl import Qwen2VL

    blocks = Qwen2VL.blocks
    monkeypatch.setattr(Qwen2VL, "blocks", lambda self, model: [b for b in blocks(self, model) if b.group != "merger"])
    assert_two_lines(cli("quantize", "demo", "-o", out, "--modules", "merger"), "has no merger module", "--modules")


def test_a_defect_of_ours_names_the_file_with_the_traceback(
    cli: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object, **_keywords: object) -> None:
        raise KeyError("surprise\x1b[31m")

    monkeypatch.setattr("qe_edge.cli.quantize_work.make_plan", broken)
    outcome = cli("quantize", "demo", "-o", out)
    assert outcome.code == 1
    assert len(outcome.err.strip().splitlines()) == 2
    assert "Traceback" not in outcome.err
    assert "\x1b" not in outcome.err
    log = Path(outcome.err.split("'")[-2])
    text = log.read_text()
    log.unlink()
    assert "Traceback" in text
    assert "surprise" in text
    assert "qe-edge quantize demo" in text
    assert "Traceback" in cli("quantize", "demo", "-o", out, "--verbose").err


def test_memory_that_runs_out_while_quantizing(cli: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_arguments: object, **_keywords: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qe_edge.cli.quantize_work.make_plan", greedy)
    assert_two_lines(cli("quantize", "demo", "-o", out), "Memory ran out", "--samples")


@pytest.mark.parametrize("command", ["quantize", "deploy"])
@pytest.mark.parametrize(("name", "remedy"), [("cuda:99", "--device cpu"), ("tpu", "Choose auto, cpu, cuda")])
def test_a_device_that_is_not_there(cli: Run, out: Path, command: str, name: str, remedy: str) -> None:
    assert_two_lines(cli(command, "demo", "-o", out, "--device", name), f"'{name}'", remedy)
    assert_nothing_written(out)
