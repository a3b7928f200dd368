"""What pi0 refuses: samples, states, settings, and methods that rest on text."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qe_edge.calibration.lines import read_line
from qe_edge.calibration.sources import hash_samples, load_samples
from qe_edge.cli.run_actions import read_state
from qe_edge.demo import model_path
from qe_edge.models.configuration import load_family
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.pi0 import MAX_CAMERAS
from qe_edge.models.samples import Turn
from qe_edge.quantization.plan import make_plan
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import MODULES, make_recipe
from qe_edge.system.errors import CalibrationError, InputError, ModelError, RecipeError
from tests.models.conversations import SQUARE
from tests.models.pi0_models import ACTION, CALIBRATION, CHUNK, LAYERS, LINEARS, TASK, recorded, state, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pi0") / "model")


@pytest.fixture(scope="module")
def original(folder: Path) -> LoadedModel:
    return load_model(str(folder), torch.float32)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"state": None}, "no state of the robot"),
        ({"state": state(0)[:2]}, "state has 2 numbers; the model was trained on 5"),
        ({"image": None}, "there is no picture"),
        ({"image": (SQUARE,) * (MAX_CAMERAS + 1)}, f"There are {MAX_CAMERAS + 1} cameras"),
        ({"marks": (3,)}, "Pictures stand before a task"),
        ({"kind": TEXT}, "no running text"),
        ({"earlier": (Turn("user", "go"), Turn("assistant", "no"))}, "no conversation"),
        ({"actions": recorded(0)[:2]}, f"There are 2 actions of {ACTION} numbers; the model makes {CHUNK}"),
        ({"question": "go " * 600}, "the model reads 505"),
    ],
)
def test_samples_that_are_refused(original: LoadedModel, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        original.family.encode(original.processor, [replace(TASK, origin="line 3", **changes)])


@pytest.mark.parametrize("numbers", [[0.1, float("nan")], [float("inf")], ["1"], [True], [], "1,2", 3.0])
def test_states_that_are_no_numbers(numbers: Any, tmp_path: Path) -> None:  # noqa: ANN401 - any value
    with pytest.raises(InputError, match="list of finite numbers") as error:
        Sample(SQUARE, "go", state=numbers)
    line = json.dumps({"question": "go", "state": numbers})
    with pytest.raises(CalibrationError, match=r"Line 4 of|JSON"):
        read_line(line, tmp_path / "data.jsonl", 4)
    assert error.value.remedy


def test_other_models_refuse_a_state(tmp_path: Path) -> None:
    demo = load_family(str(model_path()))
    with pytest.raises(InputError, match="makes no actions"):
        demo.encode(demo.load_processor(str(model_path())), [TASK])
    with pytest.raises(InputError, match="different numbers of values"):
        Sample(SQUARE, "go", state=[1], actions=[[1, 2], [3]])
    line = '{"question": "go", "state": [1, 2.5], "actions": [[1], [2]]}'
    sample = read_line(line, tmp_path / "data.jsonl", 1)
    assert (sample.state, sample.actions) == ((1.0, 2.5), ((1.0,), (2.0,)))
    others = (replace(sample, state=[1, 2]), replace(sample, actions=None), replace(sample, state=None))
    assert len({hash_samples([one]) for one in (sample, *others)}) == 4
    assert read_state("[1, -2]") == (1.0, -2.0)


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ({"budget": {"bits": 4.25}}, "A budget needs a model that writes text"),
        ({"method": "mbq"}, "'mbq' as it is set needs"),
        ({"method": "quarot"}, "'quarot' as it is set needs"),
        ({"method": "loaq"}, "'loaq' as it is set needs"),
        ({"method": "dlqat"}, "'dlqat' as it is set needs"),
        ({"head": "int4"}, "--head needs"),
    ],
)
def test_what_rests_on_text_is_refused(folder: Path, choices: dict[str, Any], problem: str) -> None:
    recipe = make_recipe(**{"method": "qe", "modules": ("language", "action"), **choices})
    for work in (quantize, make_plan):
        with pytest.raises(RecipeError, match=problem):
            work(str(folder), recipe, CALIBRATION)


def test_plan_counts_layers_and_what_is_kept(folder: Path) -> None:
    recipe = make_recipe(method="rtn", modules=MODULES)
    few, many = (make_plan(str(folder), recipe, CALIBRATION * count) for count in (8, 800))
    assert len(few.layers) == sum(LINEARS.values())
    assert many.memory_bytes - few.memory_bytes > 8 * LAYERS * 16 * 12 * 2 * (800 - 8)


@pytest.mark.parametrize(
    ("file", "changes", "problem"),
    [
        ("processor_config.json", {"state_mean": None}, "state_mean"),
        ("processor_config.json", {"state_std": [1.0, 0.0, 1.0, 1.0, 1.0]}, "state_std"),
        ("processor_config.json", {"actions_std": [1.0]}, "actions_mean has 4 numbers and actions_std 1"),
        ("processor_config.json", {"actions_mean": [0.0] * 9, "actions_std": [1.0] * 9}, "the model reads 8"),
        ("preprocessor_config.json", {"do_pad": False}, "do_pad"),
        ("preprocessor_config.json", {"pad_size": {"height": 32, "width": 16}}, "size and pad_size differ"),
        ("config.json", {"chunk_size": 0}, "chunk_size"),
        ("config.json", {"dit_config": {"head_dim": 32}}, "head_dim is 16 in vlm_config.text_config and 32"),
        ("config.json", {"dit_config": {"num_hidden_layers": 3}}, "num_hidden_layers is 2"),
    ],
)
def test_settings_that_do_not_fit(
    folder: Path, file: str, changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    values = json.loads((copy / file).read_text(encoding="utf-8"))
    for key, value in changes.items():
        values[key] = {**values[key], **value} if file == "config.json" and isinstance(value, dict) else value
    (copy / file).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_family(str(copy)).load_processor(str(copy))


def test_the_questions_that_calibrate_by_default(folder: Path) -> None:
    recipe = make_recipe()
    for run in (
        lambda: make_plan(str(folder), recipe, load_samples("demo", 2)),
        lambda: quantize(str(folder), recipe),
    ):
        with pytest.raises(CalibrationError, match="the demo's questions, which calibrate by default") as caught:
            run()
        assert "--calibration FILE" in caught.value.remedy
