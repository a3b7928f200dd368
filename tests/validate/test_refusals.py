"""A whole validation that must not end in a report: numbers that are not finite, and engines of other settings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from qe_edge.cli import main
from qe_edge.models.loading import LoadedModel
from qe_edge.runtime.manifest import Manifest, read_manifest
from qe_edge.runtime.sessions import Array, OrtSession
from qe_edge.system.errors import ArtifactError, NumericalError
from qe_edge.validate import evaluation, validate
from tests.conftest import Exported
from tests.sealing import seal


def _words(small: Path, exported: Exported, folder: Path) -> list[str]:
    engines = ["--engines", str(exported.onnx), "-o", str(folder / "report.json"), "--limit", "2"]
    return ["validate", str(small), str(exported.checkpoint), *engines]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_engine_whose_logits_are_not_finite(
    small: Path,
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    value: float,
) -> None:
    run = OrtSession.run

    def poisoned(
        session: OrtSession, feeds: Mapping[str, Array], into: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        outputs = run(session, feeds, into)
        logits = outputs.get("logits")
        if isinstance(logits, np.ndarray):
            logits[-1, -1, 7] = value
        return outputs

    monkeypatch.setattr(OrtSession, "run", poisoned)
    assert main(_words(small, exported, tmp_path)) == 2
    lines = capfd.readouterr().err.strip().splitlines()[-2:]
    assert lines[0].startswith("Error: ")
    assert "engine" in lines[0]
    assert "NaN or infinity" in lines[0]
    assert lines[1].startswith("  Fix: ")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_that_computes_nan(
    small: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = evaluation.load_quantized

    def poisoned(folder: Path) -> LoadedModel:
        loaded = load(folder)
        norms = [weight for name, weight in loaded.model.named_parameters() if name.endswith("layernorm.weight")]
        with torch.no_grad():
            norms[-1][3] = torch.nan
        return loaded

    monkeypatch.setattr(evaluation, "load_quantized", poisoned)
    with pytest.raises(NumericalError, match="NaN or infinity"):
        validate(str(small), checkpoint, None, "demo", limit=2)
    words = ["validate", str(small), str(checkpoint), "-o", str(tmp_path / "report.json"), "--limit", "2"]
    assert main(words) == 2
    assert list(tmp_path.iterdir()) == []


def test_an_engine_of_other_generation_settings(small: Path, exported: Exported, tmp_path: Path) -> None:
    other = tmp_path / "onnx"
    shutil.copytree(exported.onnx, other)
    manifest = read_manifest(other)
    generation = manifest.generation.model_copy(update={"repetition_penalty": 1.3})
    Manifest.model_validate(manifest.model_copy(update={"generation": generation}).model_dump()).write(other)
    seal(other)
    with pytest.raises(ArtifactError, match="decode by different generation settings") as caught:
        validate(str(small), exported.checkpoint, other, "demo", limit=2)
    assert caught.value.remedy == "Export and build it again."
