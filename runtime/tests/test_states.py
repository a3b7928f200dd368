"""A model whose layers keep states: the C++ library answers as Python, whatever its cache held before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from qe_edge.models.samples import Sample, Turn
from qe_edge.runtime.engine import VisionLanguageEngine
from test_answers import ROOT, Runner, asked, python_ids

MAKE = """
import pathlib, sys
from tests.models.test_decoders import export_of
export_of(sys.argv[1], pathlib.Path(sys.argv[2]))
"""


@pytest.fixture(scope="module", params=["lfm2", "qwen3.5"])
def stateful(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stateful")
    subprocess.run([sys.executable, "-c", MAKE, request.param, str(out)], cwd=ROOT, check=True)
    return out / "onnx"


def test_turns_and_prompts_that_are_cut_are_answered_as_in_python(
    build: Path, stateful: Path, onnxruntime: Path, tmp_path: Path
) -> None:
    engine = VisionLanguageEngine.load(stateful, threads=1)
    runner = Runner(build / "tests/answer", stateful, onnxruntime, tmp_path)
    told = ["what color is the shape?", "why?", "is there a red shape in the image?"]
    options = {"max_new_tokens": 2}  # so few that their text has the same tokens again
    turns = [[asked(text)] for text in told]
    kept, freed, alone = runner(
        [
            {"turns": turns, "options": options},
            {"turns": turns, "options": options, "pieces": 1},  # a turn is forgotten, and the next prompt is shorter
            {"turns": turns[2:], "options": options},
        ]
    )
    said: tuple[Turn, ...] = ()
    for text, answer in zip(told, kept["answers"], strict=True):
        assert answer["ids"] == python_ids(engine, Sample(None, text, earlier=said))[:2]
        said = (*said, Turn("user", text), Turn("assistant", answer["text"]))
    assert kept["answers"][0]["cached"] == 0 < kept["answers"][1]["cached"]
    assert freed["answers"][2]["cached"] == 0
    assert freed["answers"][2]["ids"] == alone["answers"][0]["ids"][: len(freed["answers"][2]["ids"])]
    assert freed["answers"][2]["ids"]
