"""What no engine can decode is refused before any work, and leaves no folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qe_edge.deploy.pipeline import deploy
from qe_edge.export.exporter import export_model
from qe_edge.models.quantized import load_quantized
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ArtifactError, ModelError
from qe_edge.validate import validate
from tests.conftest import Exported
from tests.sealing import seal
from tests.small_vlm import write_small_vlm


def _generation(folder: Path, **values: object) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def test_deploy_refuses_before_it_quantizes(tmp_path: Path) -> None:
    model = write_small_vlm(tmp_path / "model")
    _generation(model, num_beams=4)
    with pytest.raises(ModelError, match="num_beams = 4") as caught:
        deploy(str(model), tmp_path / "out", make_recipe(method="rtn"))
    assert caught.value.remedy.startswith("Remove num_beams")
    assert not (tmp_path / "out").exists()


def test_export_and_validate_refuse_before_they_load(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(exported.checkpoint, tmp_path / "checkpoint"))
    _generation(copy, stop_strings=["###"])
    seal(copy)
    assert load_quantized(copy).model.generation_config is not None  # quantizing and loading keep it
    monkeypatch.setattr("qe_edge.export.exporter.load_quantized", lambda _folder: pytest.fail("it was loaded"))
    with pytest.raises(ModelError, match="stop_strings"):
        export_model(copy, tmp_path / "onnx")
    with pytest.raises(ModelError, match="stop_strings"):
        validate(str(write_small_vlm(tmp_path / "model")), copy, None, "demo", limit=1)
    assert not (tmp_path / "onnx").exists()


def test_a_broken_file_of_a_checkpoint(tmp_path: Path, exported: Exported) -> None:
    copy = Path(shutil.copytree(exported.checkpoint, tmp_path / "checkpoint"))
    (copy / "generation_config.json").write_text("{]", encoding="utf-8")
    seal(copy)
    with pytest.raises(ArtifactError, match="not valid JSON"):
        load_quantized(copy)
