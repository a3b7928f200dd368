"""Pictures of several sizes, with a number, refused ones, and ones that others change: C++ answers as Python."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from qe_edge.models.samples import Sample, Turn
from qe_edge.runtime.engine import VisionLanguageEngine
from test_answers import NEW, ROOT, Runner, asked, python_ids
from test_folder import edit_and_seal

FAMILIES = ("minicpmv4_6", "llava_onevision")
MAKE = """
import importlib, pathlib, sys
from tests.models.families import export_of
for name in sys.argv[2:]:
    export_of(importlib.import_module("tests.models.test_" + name).write, pathlib.Path(sys.argv[1]) / name)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of all families, made in one process, because its imports take long."""
    out = tmp_path_factory.mktemp("pictured")
    subprocess.run([sys.executable, "-c", MAKE, str(out), *FAMILIES], cwd=ROOT, check=True)
    return out


@pytest.fixture(scope="module", params=FAMILIES)
def pictured(request: pytest.FixtureRequest, exported: Path) -> Path:
    return exported / str(request.param) / "onnx"


def test_questions_about_pictures_are_answered_as_in_python(
    build: Path, pictured: Path, onnxruntime: Path, tmp_path: Path
) -> None:
    engine = VisionLanguageEngine.load(pictured, threads=1)
    runner = Runner(build / "tests/answer", pictured, onnxruntime, tmp_path)
    source = np.random.default_rng(0)
    small, large, wide = (source.integers(0, 256, (*size, 3), np.uint8) for size in ((30, 40), (203, 117), (60, 300)))
    samples = [
        Sample(None, "what color is it?"),
        Sample(small, "what is it?"),
        Sample(large, "what is it?"),
        Sample((large, small, wide), "what differs?"),
        Sample((wide, large), "and here?", earlier=(Turn("user", "a shape?", (2,)), Turn("assistant", "yes"))),
    ]
    requests = []
    for sample in samples:
        shown = iter(sample.pictures)
        messages = []
        for turn in sample.conversation:
            parts: list[object] = []
            start = 0
            for mark in turn.marks:
                parts += [turn.text[start:mark], runner.picture(next(shown))]  # type: ignore[arg-type] # arrays alone
                start = mark
            messages.append(asked(*parts, turn.text[start:], role=turn.role))
        requests.append({"turns": [messages], "options": {"max_new_tokens": NEW}})
    found = runner(requests)
    assert [answer["answers"][0]["ids"] for answer in found] == [python_ids(engine, sample) for sample in samples]


def test_a_second_picture_comes_in_a_later_turn(build: Path, pictured: Path, onnxruntime: Path, tmp_path: Path) -> None:
    """It may change what the first one becomes."""
    runner = Runner(build / "tests/answer", pictured, onnxruntime, tmp_path)
    source = np.random.default_rng(1)
    first, second = (runner.picture(source.integers(0, 256, (*size, 3), np.uint8)) for size in ((203, 117), (60, 300)))
    options = {"max_new_tokens": 3}
    told, then = [asked(first, "what is it?")], [asked(second, "and this?")]
    (kept,) = runner([{"turns": [told, then], "options": options}])
    history = [*told, asked(kept["answers"][0]["text"], role="assistant"), *then]
    (whole,) = runner([{"turns": [history], "options": options}])
    assert kept["answers"][1]["ids"] == whole["answers"][0]["ids"]
    assert kept["answers"][1]["prompt"] == whole["answers"][0]["prompt"]


def test_a_picture_that_the_graph_refuses_is_named(
    build: Path, folder: Path, onnxruntime: Path, tmp_path: Path
) -> None:
    """As graphs do it: the picture has no tokens."""
    copy = tmp_path / "folder"
    shutil.copytree(folder, copy)
    path = copy / "preprocess.onnx"
    model = onnx.load(path)
    for node in model.graph.node:
        node.output[:] = ["every_id" if name == "placeholder_ids" else name for name in node.output]
    zero = onnx.numpy_helper.from_array(np.zeros(1, np.int64), "zero")
    model.graph.initializer.append(zero)
    model.graph.node.append(onnx.helper.make_node("Slice", ["every_id", "zero", "zero"], ["placeholder_ids"]))
    onnx.save(model, path)
    data = path.read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_and_seal(copy, lambda table: table["files"]["preprocess.onnx"].update(entry))
    runner = Runner(build / "tests/answer", copy, onnxruntime, tmp_path)
    picture = runner.picture(np.zeros((30, 40, 3), np.uint8))
    (found,) = runner([{"turns": [[asked(picture, "what?")]], "options": {"max_new_tokens": 1}}])
    assert "A picture is too narrow for the model" in found["error"]
