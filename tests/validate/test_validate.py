"""The whole validation of a checkpoint without an engine, and what it says about missing parts."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qe_edge.checkpoint.files import RECIPE
from qe_edge.layers.linear import QELinear, quantized_linears
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ArtifactError, CalibrationError
from qe_edge.system.progress import Silent
from qe_edge.validate import Report, evaluation, validate
from qe_edge.validate.run import LIMITED, NO_CALIBRATION
from qe_edge.validate.subjects import in_float32, load_float32
from tests.sealing import seal


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


def test_no_model_is_there_longer_than_it_is_needed(
    small: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is alive and decoded when the original, the comparison and the quantized model have their turns."""
    models: dict[str, weakref.ref[LoadedModel]] = {}
    seen: list[tuple[set[str], bool]] = []
    layers: list[QELinear] = []

    def opened(name: str, load: Callable[..., LoadedModel]) -> Callable[..., LoadedModel]:
        def keep(source: object) -> LoadedModel:
            loaded = load(source)
            models[name] = weakref.ref(loaded)
            layers.extend(list(quantized_linears(loaded.model).values())[:1])
            return loaded

        return keep

    def noted(work: Callable[..., object]) -> Callable[..., object]:
        def note(*arguments: object) -> object:
            result = work(*arguments)
            alive = {name for name, model in models.items() if model() is not None}
            seen.append((alive, layers[0]._decoded is not None))
            return result

        return note

    for name, load in (("original", "load_float32"), ("quantized", "load_quantized")):
        monkeypatch.setattr(evaluation, load, opened(name, getattr(evaluation, load)))
    for work in ("answer_all", "_compare"):
        monkeypatch.setattr(evaluation, work, noted(getattr(evaluation, work)))
    validate(str(small), checkpoint, None, "demo", limit=2)
    both = {"original", "quantized"}
    turns = [(both, False), (both, False), (both, False), ({"quantized"}, True), ({"quantized"}, True)]
    assert seen == turns
    assert models["quantized"]() is None


def test_the_original_is_read_block_by_block(small: Path) -> None:
    plain, blockwise = load_model(str(small), torch.float32), load_float32(str(small))
    assert blockwise.model.state_dict().keys() == plain.model.state_dict().keys()
    for name, tensor in blockwise.model.state_dict().items():
        assert tensor.dtype == torch.float32 or not tensor.is_floating_point(), name
        assert torch.equal(tensor, plain.model.state_dict()[name]), name


def test_what_is_the_same_in_both_models_is_in_memory_once(small: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"  # not rotated: that changes embeddings and norms
    options = {"tokens": 128, "em_steps": 1, "rotate": False}
    recipe = make_recipe(modules=("language", "visual", "merger"), options=options, calibration={"samples": 4})
    save_quantized(*quantize(str(small), recipe), checkpoint)
    original = load_float32(str(small))
    alone, beside = (load_quantized(checkpoint) for _ in range(2))
    in_float32(alone)
    in_float32(beside, like=original, decoded=False)
    shared = {tensor.data_ptr() for tensor in original.model.state_dict().values()}
    plain = [name for name in beside.model.state_dict() if "embed" in name or "norm" in name]
    assert len(plain) > 4
    for name in plain:
        assert beside.model.state_dict()[name].data_ptr() in shared, name
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(tensor, beside.model.state_dict()[name]), name
    changed = load_quantized(checkpoint)
    next(parameter for name, parameter in changed.model.named_parameters() if "norm" in name).data[0] += 1
    in_float32(changed, like=original)
    name = next(name for name, _ in changed.model.named_parameters() if "norm" in name)
    assert changed.model.state_dict()[name].data_ptr() not in shared


def test_other_calibration_data_are_not_passed_off_as_the_original(
    small: Path, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    recipe = json.loads((copy / RECIPE).read_text(encoding="utf-8"))
    recipe["calibration"]["sha256"] = "0" * 64
    (copy / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    seal(copy)
    report = validate(str(small), copy, None, "demo", limit=2)
    assert NO_CALIBRATION in report.notes
    assert all(layer.calibration is None for layer in report.layers)


def test_every_end_token_of_the_original_survives(checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy)
    path = copy / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, "eos_token_id": [2, 5]}), encoding="utf-8")
    seal(copy)
    generation = load_quantized(copy).model.generation_config
    assert generation.eos_token_id == [2, 5]  # type: ignore[union-attr]
    path.write_text("{", encoding="utf-8")
    seal(copy)
    with pytest.raises(ArtifactError, match="generation_config"):
        load_quantized(copy)


def test_no_question_at_all(small: Path, checkpoint: Path) -> None:
    with pytest.raises(CalibrationError, match="holds no question"):
        validate(str(small), checkpoint, None, "demo", limit=0)
