"""Checkpoints, graphs, engines and reports that were not made from each other are refused before any work."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from qe_edge.checkpoint.files import FILES, CheckpointFiles, Origin, read_checkpoint_files
from qe_edge.export.build import build_engines
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.report.neighbours import NOT_FOUND, find_changes
from qe_edge.runtime.manifest import read_description
from qe_edge.runtime.provenance import NO_ORIGIN, NO_REVISION, check_deployment, check_quantized_from
from qe_edge.system.errors import ArtifactError
from qe_edge.validate import run, validate
from qe_edge.validate.artifacts import trace_artifacts
from qe_edge.validate.schema import Artifact, Report
from tests.conftest import Exported
from tests.report.conftest import make_report
from tests.sealing import seal


@pytest.fixture(scope="module")
def stranger(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same model, quantized otherwise."""
    folder = tmp_path_factory.mktemp("stranger") / "other"
    recipe = make_recipe(method="rtn", scheme="w4a16", calibration={"samples": 2})
    save_quantized(*quantize(str(small), recipe), folder)
    return folder


@pytest.fixture(scope="module")
def engines(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engines(exported.onnx, tmp_path_factory.mktemp("built") / "cpu", "cpu")


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    for name in ("load_evaluation", "evaluate", "load_checkpoint_recipe"):
        monkeypatch.setattr(run, name, work)


@pytest.mark.usefixtures("no_work")
def test_engines_of_another_checkpoint(small: Path, stranger: Path, engines: Path, exported: Exported) -> None:
    mine, other = (read_checkpoint_files(folder).digest[:12] for folder in (stranger, exported.checkpoint))
    for given in ({"engines": engines}, {"onnx": exported.onnx}, {"not_run": [engines]}):
        choices = {"engines": None, **given}
        with pytest.raises(ArtifactError) as caught:
            validate(str(small), stranger, choices.pop("engines"), "demo", **choices)  # type: ignore[arg-type]
        folder = next(iter(given.values()))
        folder = folder[0] if isinstance(folder, list) else folder
        words = f"'{folder}' was made from another checkpoint ({other}) than '{stranger}' ({mine})."
        assert caught.value.problem == words
        assert "Export this checkpoint" in caught.value.remedy


@pytest.mark.usefixtures("no_work")
def test_another_original(small: Path, exported: Exported, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(small, copy)
    (copy / "README.md").write_text("decides nothing", encoding="utf-8")
    assert check_quantized_from(exported.checkpoint, str(copy), None) is None
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        kept = (copy / name).read_bytes()
        changed = bytearray(kept)
        changed[-1] ^= 1
        (copy / name).write_bytes(changed)
        with pytest.raises(ArtifactError, match=re.escape(f"as it is now: '{name}' is not")) as caught:
            check_quantized_from(exported.checkpoint, str(copy), None)
        assert "quantize this one" in caught.value.remedy
        (copy / name).write_bytes(kept)
    with pytest.raises(ArtifactError, match=r"'config\.json' is not the same"):
        validate("demo", exported.checkpoint, None, "demo")


def with_origin(source: Path, folder: Path, origin: Origin | None) -> Path:
    shutil.copytree(source, folder)
    found = read_checkpoint_files(folder)
    CheckpointFiles(origin=origin, files=found.files).write_sealed(folder / FILES)
    return folder


def test_an_original_of_the_hub(small: Path, exported: Exported, tmp_path: Path) -> None:
    origin = Origin(hub="owner/name", revision="1" * 40)
    folder = with_origin(exported.checkpoint, tmp_path / "hub", origin)
    assert check_quantized_from(folder, "owner/name", "1" * 40) is None
    assert check_quantized_from(folder, "owner/name", None) == NO_REVISION
    assert check_quantized_from(folder, str(small), None) == NO_REVISION
    with pytest.raises(ArtifactError, match="'revision 222222222222' is not the same"):
        check_quantized_from(folder, "owner/name", "2" * 40)


def test_what_cannot_be_compared_is_said(small: Path, exported: Exported, tmp_path: Path) -> None:
    folder = with_origin(exported.checkpoint, tmp_path / "made", None)
    found, notes = trace_artifacts(str(small), "model", folder, None, [])
    assert notes == [NO_ORIGIN]
    assert found[0] == Artifact(stage="original", name="model", digest=None)


def test_graphs_of_a_model_in_memory(small: Path, exported: Exported, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.onnx, tmp_path / "onnx"))
    read_description(folder).model_copy(update={"checkpoint": None}).write(folder)
    with pytest.raises(ArtifactError, match="exported from a model in memory") as caught:
        trace_artifacts(str(small), "model", exported.checkpoint, None, [folder])
    assert "qe-edge export" in caught.value.remedy


def test_engines_of_other_graphs(small: Path, exported: Exported, engines: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.onnx, tmp_path / "onnx"))
    found, notes = trace_artifacts(str(small), "model", exported.checkpoint, folder, [engines, folder])
    assert [artifact.stage for artifact in found] == ["original", "checkpoint", "onnx", "engines", "engines"]
    assert not notes
    assert found[2].digest == found[4].digest == read_description(engines).onnx
    read_description(folder).model_copy(update={"quantization": "other"}).write(folder)
    with pytest.raises(ArtifactError, match=f"'{engines}' was built from other graphs") as caught:
        trace_artifacts(str(small), "model", exported.checkpoint, folder, [engines])
    assert "Build these graphs again" in caught.value.remedy


def test_a_deployment_of_two_runs(stranger: Path, exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.onnx, tmp_path / "onnx")
    check_deployment(tmp_path, tmp_path / "onnx")
    shutil.copytree(exported.checkpoint, tmp_path / "checkpoint")
    check_deployment(tmp_path, tmp_path / "onnx")
    shutil.rmtree(tmp_path / "checkpoint")
    shutil.copytree(stranger, tmp_path / "checkpoint")
    check_deployment(tmp_path / "onnx", tmp_path / "onnx")
    with pytest.raises(ArtifactError, match="was made from another checkpoint"):
        check_deployment(tmp_path, tmp_path / "onnx")


@pytest.fixture
def measured(exported: Exported, engines: Path, tmp_path: Path) -> tuple[Report, Path]:
    """A report in a folder of what it measured, as `deploy` leaves it."""
    shutil.copytree(exported.checkpoint, tmp_path / "checkpoint")
    shutil.copytree(engines, tmp_path / "engines" / "cpu")
    artifacts = [
        Artifact(stage="original", name="checkpoint", digest=None),  # its name is nobody's folder here
        Artifact(stage="checkpoint", name="checkpoint", digest=read_checkpoint_files(tmp_path / "checkpoint").digest),
        Artifact(stage="engines", name="cpu", digest=read_description(engines).digest),
    ]
    return make_report().model_copy(update={"artifacts": artifacts}), tmp_path / "report.json"


def test_a_report_beside_what_it_measured(measured: tuple[Report, Path], tmp_path: Path) -> None:
    assert find_changes(*measured) == []
    assert find_changes(measured[0], tmp_path / "elsewhere" / "report.json") == [NOT_FOUND]


def test_a_report_beside_something_else(measured: tuple[Report, Path], tmp_path: Path) -> None:
    engine = tmp_path / "engines" / "cpu"
    path = engine / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "temperature": 0.5}), encoding="utf-8")
    (changed,) = find_changes(*measured)
    assert f"'{engine}' is not what this report measured: '{path}' is damaged" in changed
    seal(engine)
    (changed,) = find_changes(*measured)
    assert changed == f"'{engine}' is not what this report measured: it was written again since. Validate again."


def test_a_report_that_names_folders_elsewhere(measured: tuple[Report, Path], tmp_path: Path) -> None:
    names = ["../checkpoint", "/etc", "..", "a\0b"]
    artifacts = [Artifact(stage="checkpoint", name=name, digest="0" * 64) for name in names]
    report = measured[0].model_copy(update={"artifacts": artifacts})
    assert find_changes(report, tmp_path / "engines" / "report.json") == [NOT_FOUND]
