"""What no other format holds is refused before any work, in one sentence with a remedy; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qe_edge.calibration.sources import load_evaluation
from qe_edge.cli import main
from qe_edge.formats import FORMATS
from qe_edge.formats.convert import convert_checkpoint
from qe_edge.models.loading import load_model
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ArtifactError, TargetError
from tests.formats.checkpoints import write_checkpoint
from tests.sealing import seal
from tests.small_models import write_small_dinov2

ROUTED = {"experts": 2, "shared_rank": 8, "routed_rank": 8, "shrink": False, "tokens": 128, "em_steps": 0}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "routed experts": ({"method": "qe", "options": ROUTED}, "experts that every token chooses anew", "experts=0"),
    "activations of 8 bits": ({"method": "rtn", "scheme": "w4a8"}, "rounded to 8 bits", "--activations 16"),
    "a rotation and a head of codes": ({"method": "quarot", "head": "int4"}, "a rotation put a matrix in", "--decode"),
    "outliers": ({"method": "spqr"}, "has parts that only PyTorch computes", "--decode"),
    "codebooks": ({"method": "quipsharp"}, "has parts that only PyTorch computes", "--decode"),
    "scales without a place": ({"method": "awq"}, "more) has channel scales", "--decode"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_has_no_place_is_refused(case: str, tmp_path: Path) -> None:
    recipe, problem, remedy = CASES[case]
    checkpoint = write_checkpoint(tmp_path, **recipe)
    for name in FORMATS:
        with pytest.raises(TargetError) as caught:
            convert_checkpoint(checkpoint, name, tmp_path / "out")
        assert problem in caught.value.problem
        assert remedy in caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_vision_encoders_alone_are_refused(tmp_path: Path) -> None:
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=("visual",), calibration={"samples": 2})
    encoder = load_model(str(write_small_dinov2(tmp_path / "model")))
    save_quantized(*quantize(encoder, recipe, load_evaluation("demo")[:2]), tmp_path / "checkpoint")
    with pytest.raises(TargetError, match="a vision encoder alone"):
        convert_checkpoint(tmp_path / "checkpoint", "compressed-tensors", tmp_path / "out")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made"), "rtn")


def test_the_command(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["convert", str(checkpoint.parent), "--to", "compressed-tensors", "-o", str(out)]
    assert main(words) == 0
    assert "every code as it was" in capfd.readouterr().out
    assert main(words) == 2
    assert "is not empty" in capfd.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    (out / "mine.txt").write_text("of somebody else", encoding="utf-8")
    assert main([*words, "--overwrite"]) == 2
    assert "was not written by QE-Edge" in capfd.readouterr().err
    assert (out / "mine.txt").is_file()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--to", "compressed-tensor"], "Did you mean 'compressed-tensors'?"),
        (["--to", "compressed-tensors", "--as", "llama"], "do not go together"),
        (["--decode"], "--decode goes with --to"),
    ],
)
def test_mistakes(
    words: list[str], problem: str, checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(checkpoint), *words, "-o", str(tmp_path / "out")]) == 2
    assert problem in capfd.readouterr().err


def test_a_damaged_checkpoint_is_not_converted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path, "rtn")
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    words = ["convert", str(checkpoint), "--to", "compressed-tensors", "-o", str(tmp_path / "out")]
    assert main(words) == 2
    assert "its SHA-256 is not the one that was written" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("model.norm.weight", "model.norm.wait", "the tensors of 'model.norm.wait' are not those of the model"),
        ("model.norm.weight", None, "the tensors of 'model.norm.weight' are not those of the model"),
    ],
)
def test_a_strangers_checkpoint_has_the_tensors_of_its_model(
    old: str, new: str | None, problem: str, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, method="rtn")
    tensors = load_file(checkpoint / "model.safetensors")
    tensor = tensors.pop(old)
    save_file(tensors if new is None else {**tensors, new: tensor}, checkpoint / "model.safetensors")
    seal(checkpoint)
    for name in FORMATS:
        with pytest.raises(ArtifactError, match=problem):
            convert_checkpoint(checkpoint, name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_strangers_list_of_layers_holds_names(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, method="rtn")
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["ignore"] = [3]
    (checkpoint / "config.json").write_text(json.dumps(config), encoding="utf-8")
    seal(checkpoint)
    with pytest.raises(ArtifactError, match=r"'ignore' in the quantization_config of .* is no list of names"):
        convert_checkpoint(checkpoint, "gptq", tmp_path / "out")


def test_a_strangers_chat_template_is_text(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, method="rtn")
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff")
    seal(checkpoint)
    with pytest.raises(ArtifactError, match=r"The tokenizer or chat template of .* cannot be read"):
        convert_checkpoint(checkpoint, "gguf", tmp_path / "out")
