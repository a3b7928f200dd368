from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.pipeline import Pipeline
from tests.conftest import Exported
from tests.runtime.golden import MAX_NEW_TOKENS, chosen_samples, write_golden

QUESTIONS, FURTHER = 6, 10


@pytest.fixture(scope="module")
def golden(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    out = tmp_path_factory.mktemp("golden")
    write_golden(exported.onnx, out, QUESTIONS, FURTHER)
    return json.loads((out / "prompts.json").read_text(encoding="utf-8"))["prompts"], out


def test_answers_without_a_familys_code_are_the_engines(exported: Exported, golden: tuple[list[Any], Path]) -> None:
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    for sample, prompt in zip(chosen_samples(QUESTIONS, FURTHER), golden[0], strict=True):
        encoded = engine.encode([sample])
        assert prompt["ids"] == encoded.input_ids[0].tolist()
        assert prompt["answers"][0]["ids"] == engine.generate_ids(encoded, MAX_NEW_TOKENS)[0]


def test_the_pipeline_gives_the_same_answers(exported: Exported, golden: tuple[list[Any], Path]) -> None:
    """Greedy and drawn; it shares prefixes and pictures between the prompts."""
    pipeline = Pipeline.from_dir(exported.onnx, threads=1)
    for sample, prompt in zip(chosen_samples(QUESTIONS, FURTHER), golden[0], strict=True):
        for answer in prompt["answers"]:
            options = {name: answer[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
            found = pipeline(sample, max_new_tokens=MAX_NEW_TOKENS, **options)
            ends = pipeline.engine.manifest.eos_token_ids
            assert [token for token in found.token_ids if token not in ends] == answer["ids"]


def test_a_seed_decides_an_answer(exported: Exported, golden: tuple[list[Any], Path], tmp_path: Path) -> None:
    write_golden(exported.onnx, tmp_path, QUESTIONS, FURTHER)
    assert json.loads((tmp_path / "prompts.json").read_text(encoding="utf-8"))["prompts"] == golden[0]
    answers = [prompt["answers"] for prompt in golden[0]]
    assert any(greedy["ids"] != drawn["ids"] for greedy, *others in answers for drawn in others)


def test_pictures_are_written_as_they_are(golden: tuple[list[Any], Path]) -> None:
    parts = [part for prompt in golden[0] for turn in prompt["turns"] for part in turn["parts"] if "picture" in part]
    assert len(parts) > QUESTIONS
    for part in parts:
        magic, size, largest, pixels = (golden[1] / part["picture"]).read_bytes().split(b"\n", 3)
        assert (magic, largest) == (b"P6", b"255")
        assert len(pixels) == 3 * np.prod([int(number) for number in size.split()])
