"""Answers of the C++ library and of Python over the same folder: equal tokens, with and without chance."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from qe_edge import demo
from qe_edge.models.samples import Sample, Turn
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.generation import adjust_logits
from qe_edge.runtime.sampling import Random, Sampling, choose_token

ROOT = Path(__file__).parents[2]
NEW = 8
STOP, LENGTH = 1, 2
RGB, BGR, RGBA, BGRA, GRAY = range(5)


class Runner:
    """The program `answer` over one folder."""

    def __init__(self, program: Path, folder: Path, onnxruntime: Path, work: Path) -> None:
        self._command = [program, folder, onnxruntime]
        self._work = work
        self._pictures = 0

    def picture(self, pixels: np.ndarray, kind: int = RGB, stride: int = 0) -> dict[str, Any]:
        """A picture of a request, from uint8 `[height, width, ...]`."""
        self._pictures += 1
        path = self._work / f"{self._pictures}.raw"
        path.write_bytes(pixels.tobytes())
        height, width = pixels.shape[:2]
        return {"file": str(path), "width": width, "height": height, "format": kind, "stride": stride}

    def __call__(self, requests: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the program says to every request."""
        lines = "\n".join(map(json.dumps, requests)) + "\n"
        done = subprocess.run(self._command, input=lines.encode(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return [json.loads(line) for line in done.stdout.decode().split("\n")[:-1]]


@pytest.fixture(scope="session")
def engine(folder: Path) -> VisionLanguageEngine:
    return VisionLanguageEngine.load(folder, threads=1)


@pytest.fixture
def runner(build: Path, folder: Path, onnxruntime: Path, tmp_path: Path) -> Runner:
    return Runner(build / "tests/answer", folder, onnxruntime, tmp_path)


def asked(*parts: object, role: str = "user") -> dict[str, Any]:
    return {"role": role, "parts": list(parts)}


def pixels_of(name: str) -> np.ndarray:
    with Image.open(demo.evaluation_path().parent / name) as image:
        return np.asarray(image.convert("RGB"))


def python_ids(
    engine: VisionLanguageEngine, sample: Sample, sampling: Sampling | None = None, seed: int = 0, **rules: object
) -> list[int]:
    """Tokens of Python's answer."""
    encoded = engine.encode([sample])
    logits, state = engine.prefill(encoded, engine.features(encoded))
    settings = engine.manifest.generation.model_copy(update=rules)
    random, ids = Random(seed), []
    while len(ids) < NEW:
        scores = adjust_logits(settings, logits[:, -1], state.tokens, state.attention_mask, state.step)
        token = choose_token(scores[0], sampling or Sampling(), random)
        if token in settings.eos_token_ids:
            break
        ids.append(token)
        if len(ids) < NEW:
            logits = engine.decode(state, np.array([token]))
    return ids


@pytest.fixture(scope="session")
def golden(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The prompts and answers that every runtime has to give over the folder, and where their pictures are."""
    out = tmp_path_factory.mktemp("golden")
    command = [sys.executable, "-m", "tests.runtime.golden", str(folder), str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return out, json.loads((out / "prompts.json").read_text())


def test_golden_answers_are_equal(runner: Runner, golden: tuple[Path, dict[str, Any]]) -> None:
    out, content = golden
    requests, wanted = [], []
    for prompt in content["prompts"]:
        messages = []
        for turn in prompt["turns"]:
            parts = [part.get("text") or opened(runner, out / part["picture"]) for part in turn["parts"]]
            messages.append(asked(*parts, role=turn["role"]))
        for answer in prompt["answers"]:
            options = {name: answer[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed")}
            requests.append({"turns": [messages], "options": options | {"max_new_tokens": content["max_new_tokens"]}})
            wanted.append((answer["ids"], answer["text"]))
    found = [answer["answers"][0] for answer in runner(requests)]
    assert len(content["prompts"]) == 250
    assert [(answer["ids"], answer["text"]) for answer in found] == wanted
    for answer in found:
        assert answer["finish"] == (LENGTH if len(answer["ids"]) == content["max_new_tokens"] else STOP)


def opened(runner: Runner, path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return runner.picture(np.asarray(image))


CHANCES = [
    ({"temperature": 4.0}, {}),
    ({"temperature": 2.5, "top_k": 7}, {}),
    ({"temperature": 6.0, "top_p": 0.8, "top_k": 0}, {}),
    ({"temperature": 3.0, "min_p": 0.02, "top_k": 40}, {}),
    ({"temperature": 2.0, "top_p": 0.95, "min_p": 0.01}, {"repetition_penalty": 1.4}),
]


@pytest.mark.parametrize("number", range(len(CHANCES)))
def test_a_seed_draws_the_same_tokens(number: int, runner: Runner, engine: VisionLanguageEngine) -> None:
    chosen, rules = CHANCES[number]
    picture, seeds = pixels_of("images/evaluation/0007.png"), [0, 1, 2**64 - 1, 123456789]
    requests = [
        {
            "turns": [[asked(runner.picture(picture), "what is in the picture?")]],
            "options": {"max_new_tokens": NEW, "seed": seed, **chosen, **rules},
        }
        for seed in seeds
    ]
    sampling = Sampling(**{"top_k": 50, **chosen})
    wanted = [python_ids(engine, Sample(picture, "what is in the picture?"), sampling, seed, **rules) for seed in seeds]
    assert [answer["answers"][0]["ids"] for answer in runner(requests)] == wanted
    assert len({tuple(ids) for ids in wanted}) > 1  # chance had a say


def test_a_temperature_next_to_zero_takes_the_most_likely_tokens(runner: Runner) -> None:
    turns = [[asked("what is this?")]]
    options = [{"max_new_tokens": NEW, "temperature": value, "seed": 1} for value in (0.0, 1e-310)]
    greedy, cold = runner([{"turns": turns, "options": each} for each in options])
    assert cold["answers"] == greedy["answers"]


def conversations() -> list[list[Turn]]:
    """Fifty conversations of one to four turns, with 0 to 3 pictures in their places, and odd texts."""
    texts = [
        "what shape is this?",
        "is it <|im_end|> red?",
        "  spaces \n",
        "\u00e9\U0001f642 <|image_pad|>",
        "and here?",
    ]
    found = []
    for number in range(50):
        turns = [Turn("system", "Answer in one word.")] if number % 3 == 0 else []
        for turn in range(number % 4 + 1):
            text = texts[(number + turn) % len(texts)]
            marks = {0: (), 1: (0,), 2: (len(text) // 2,), 3: (0, len(text))}[(number // 4 + turn) % 4]
            turns.append(Turn("user", text, marks))
            if turn < number % 4:
                turns.append(Turn("assistant", ["a circle", "yes", ""][turn]))
        found.append(turns)
    return found


def test_conversations_are_answered_alike(runner: Runner, engine: VisionLanguageEngine) -> None:
    requests, wanted = [], []
    for number, turns in enumerate(conversations()):
        names = iter(range(1 + number, 60 + number))
        messages, pictures = [], []
        for turn in turns:
            parts: list[object] = []
            start = 0
            for mark in turn.marks:
                pictures.append(pixels_of(f"images/evaluation/{next(names):04}.png"))
                parts += [turn.text[start:mark], runner.picture(pictures[-1])]
                start = mark
            messages.append(asked(*parts, turn.text[start:], role=turn.role))
        requests.append({"turns": [messages], "options": {"max_new_tokens": NEW}})
        last = turns[-1]
        wanted.append(
            python_ids(engine, Sample(pictures or None, last.text, earlier=tuple(turns[:-1]), marks=last.marks))
        )
    found = runner(requests)
    assert [answer["answers"][0]["ids"] for answer in found] == wanted


def test_turns_go_on_where_the_cache_ends(runner: Runner, engine: VisionLanguageEngine) -> None:
    picture, told = runner.picture(pixels_of("images/evaluation/0003.png")), ["what shape is it?", "and its color?"]
    options = {"max_new_tokens": NEW}
    (kept,) = runner(
        [{"turns": [[asked(picture, told[0])], [asked(told[1])], [asked(picture, told[0])]], "options": options}]
    )
    first, second, third = kept["answers"]
    history = [asked(picture, told[0]), asked(first["text"], role="assistant"), asked(told[1])]
    more = [*history, asked(second["text"], role="assistant"), asked(picture, told[0])]
    again = runner([{"turns": [turns], "options": options} for turns in (history, more)])
    assert [answer["answers"][0]["ids"] for answer in again] == [second["ids"], third["ids"]]
    assert first["cached"] == 0 < second["cached"] < third["cached"]


def test_a_turn_whose_answer_is_freed_early_is_forgotten(runner: Runner) -> None:
    first, second = [asked("what shape is it?")], [asked("and its color?")]
    freed, alone = runner([{"turns": [first, second], "pieces": 1}, {"turns": [second]}])
    assert freed["answers"][0]["finish"] == 0
    assert freed["answers"][1]["prompt"] == alone["answers"][0]["prompt"]


def test_a_callback_that_wants_no_more_is_not_called_again(runner: Runner) -> None:
    assert runner([{"stopped": "what shape is it?"}]) == [{"answers": [1]}]


def test_pictures_of_every_layout_are_the_same_picture(runner: Runner, engine: VisionLanguageEngine) -> None:
    source = np.random.default_rng(0)
    opaque, clear = (source.integers(0, 256, (37, 52, 4), np.uint8) for _ in range(2))
    opaque[..., 3] = 255
    padded = np.zeros((37, 200), np.uint8)
    padded[:, : 52 * 3] = opaque[..., :3].reshape(37, -1)
    rows = runner.picture(opaque[..., :3], RGB) | {"file": runner.picture(padded)["file"], "stride": 200}
    layouts = [
        runner.picture(np.ascontiguousarray(opaque[..., :3])),
        runner.picture(np.ascontiguousarray(opaque[..., 2::-1]), BGR),
        runner.picture(opaque, RGBA),
        runner.picture(np.ascontiguousarray(opaque[..., [2, 1, 0, 3]]), BGRA),
        rows,
    ]
    grey = source.integers(0, 256, (30, 60), np.uint8)
    asks = [*layouts, runner.picture(clear, RGBA), runner.picture(grey, GRAY)]
    options = {"max_new_tokens": NEW, "temperature": 3.0, "seed": 3}
    found = runner([{"turns": [[asked(picture, "what is it?")]], "options": options} for picture in asks])
    wanted = [
        python_ids(engine, Sample(pixels, "what is it?"), Sampling(3.0, 50), 3)
        for pixels in (*[opaque[..., :3]] * 5, clear, grey)
    ]
    assert [answer["answers"][0]["ids"] for answer in found] == wanted


def test_stop_strings_and_lengths_end_an_answer(runner: Runner) -> None:
    turn = [[asked(runner.picture(pixels_of("images/evaluation/0002.png")), "what shape is in the image?")]]
    (whole,) = runner([{"turns": turn, "options": {"max_new_tokens": NEW}}])
    text = whole["answers"][0]["text"]
    cut, one = runner(
        [
            {"turns": turn, "options": {"max_new_tokens": NEW, "stop": ["never", text[2:4]]}},
            {"turns": turn, "options": {"max_new_tokens": 1}},
        ]
    )
    assert (cut["answers"][0]["text"], cut["answers"][0]["finish"]) == (text[:2], STOP)
    assert (len(one["answers"][0]["ids"]), one["answers"][0]["finish"]) == (1, LENGTH)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"turns": [[]]}, "There is nothing to answer."),
    ({"turns": [[asked("a", role="robot")]]}, "has no place for a turn of the robot first"),
    ({"turns": [[asked("a " * 2000)]]}, "together at most 1024 fit"),
    ({"turns": [[asked("a")]], "options": {"max_new_tokens": 0}}, "cannot have 0 tokens"),
    ({"turns": [[asked("a")]], "options": {"max_new_tokens": 1024}}, "Ask for at most"),
    ({"turns": [[asked("a\0b")]]}, "holds a zero byte"),
    ({"text": "a\0b"}, "holds a zero byte"),
    ({"turns": [[asked("a")]], "options": {"stop": ["a\0b"]}}, "holds a zero byte"),
    ({"turns": [[asked("a")]], "options": {"temperature": 101}}, "temperature is 101"),
    ({"turns": [[asked("a")]], "options": {"top_p": 1.5}}, "top_p is 1.5"),
    ({"turns": [[asked("a")]], "options": {"stop": [""]}}, "A stop string is empty"),
    ({"turns": [[asked({"file": "/dev/null", "width": 0, "height": 3})]]}, "0 x 3 pixels holds nothing"),
    ({"turns": [[asked({"file": "/dev/null", "width": 3, "height": 1000})]]}, "too narrow for the model"),
    ({"turns": [[asked({"file": "/dev/null", "width": 9, "height": 9, "stride": 3})]]}, "rows are 3 bytes apart"),
    ({"turns": [[asked({"file": "/dev/null", "width": 9, "height": 9, "format": 9})]]}, "pixel format 9"),
]


@pytest.mark.parametrize(("request_", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_cannot_be_answered_is_said(request_: dict[str, Any], said: str, runner: Runner) -> None:
    (found,) = runner([request_])
    assert said in found["error"]
    assert found["error"].count(". ") >= 1
    assert found["status"] == 2


def test_text_without_a_template_is_continued(runner: Runner, engine: VisionLanguageEngine) -> None:
    (found,) = runner([{"text": "the <|im_end|> circle", "options": {"max_new_tokens": NEW}}])
    assert len(found["answers"][0]["ids"]) <= NEW
    assert found["answers"][0]["cached"] == 0
