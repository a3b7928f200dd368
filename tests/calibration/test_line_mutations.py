"""Lines that strangers or accidents have changed: each becomes a sample that can be encoded, or a refusal."""

from __future__ import annotations

import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qe_edge.calibration.sources import hash_samples, read_jsonl
from qe_edge.models.loading import load_family
from qe_edge.models.samples import Sample
from qe_edge.system.errors import CommonNotice, QEError

ROUNDS = 500
SEEDS: list[dict[str, Any]] = [
    {"image": "p.png", "question": "what color is it?", "answer": "red", "kind": "open", "topic": "color"},
    {"images": ["p.png", "p.png"], "question": "<image> or <image>?", "answers": ["one", "two"], "id": 3},
    {"text": "Once upon a time."},
    {
        "image": "p.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "a"},
            {"from": "human", "value": "why?"},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "p.png"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "yes"},
        ]
    },
]
VALUES: list[Any] = [
    None, True, -1, 0, 10**400, 1.5, float("nan"), float("inf"), "", " ", "\0", "\ud83d", "a" * 5000, "../p.png", "/",
    ".", "p.png\0", "data:image/png;base64,AAAA", "file:///p.png", "~", "<image>", "<|im_end|>", "<|image_pad|>",
    "user", "😀", "\u202e", [], {}, [[]], [None], ["a"], [{}], {"a": 1}, {"url": "p.png"}, ["p.png"] * 6,
    "\\", "\r\n", "text",
]  # fmt: skip
KEYS = [
    "image",
    "images",
    "question",
    "answer",
    "answers",
    "text",
    "kind",
    "conversations",
    "messages",
    "id",
    "",
    "Image",
]


def places(value: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401 - any JSON value
    """Every table or list inside a value, with each of its keys."""
    found: list[tuple[Any, Any]] = []
    for key, child in list(value.items() if isinstance(value, dict) else enumerate(value)):
        found.append((value, key))
        if isinstance(child, dict | list):
            found += places(child)
    return found


def mutated(random_: random.Random) -> bytes:
    """A line with one to three changes of its values, and perhaps of its bytes."""
    entry = json.loads(json.dumps(random_.choice(SEEDS)))
    for _ in range(random_.randint(0, 3)):
        parent, key = random_.choice(places(entry) or [(entry, "question")])
        change = random_.randrange(4)
        if change == 0:
            parent[key] = copy.deepcopy(random_.choice(VALUES))
        elif change == 1 and isinstance(parent, dict):
            parent[random_.choice(KEYS)] = copy.deepcopy(random_.choice([*VALUES, parent.get(key)]))
        elif change == 2 and isinstance(parent, list):
            parent.insert(key, copy.deepcopy(random_.choice(VALUES)))
        elif change == 3:
            parent.pop(key, None) if isinstance(parent, dict) else parent.pop(key)
    line = bytearray(json.dumps(entry, ensure_ascii=random_.random() < 0.5).encode("utf-8", "surrogatepass"))
    if random_.random() < 0.4:
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(line) + 1)
            part = [random_.randbytes(1), b'"', b"{", b"\\u", b"\xff", b"\0", b"[" * 200, b"9" * 400][
                random_.randrange(8)
            ]
            line[at : at + random_.randrange(3)] = part
    return bytes(line)


def outcome(path: Path, family: Any, processor: Any) -> str:  # noqa: ANN401 - as families have them
    """What becomes of a file: refused as a line, refused when it is encoded, or encoded."""
    samples: list[Sample] = []
    try:
        samples = read_jsonl(path)
        hash_samples(samples)
        for sample in samples:
            family.encode(processor, [sample], answers=True)
    except QEError as error:
        if str(path) not in error.problem or not error.remedy:
            return "refused without a name or a remedy"
        return "refused later" if samples else "refused"
    return "encoded" if samples else "empty"


@pytest.mark.filterwarnings("ignore:Token indices")
def test_mutated_lines_are_read_or_refused(tmp_path: Path) -> None:
    from qe_edge.demo import model_path

    Image.new("RGB", (30, 30), "red").save(tmp_path / "p.png")
    family = load_family(str(model_path()))
    processor = family.load_processor(str(model_path()))
    path = tmp_path / "lines.jsonl"
    seen: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CommonNotice)
        for number in range(ROUNDS):
            line = mutated(random.Random(number))
            path.write_bytes(line)
            found = outcome(path, family, processor)
            seen[found] = seen.get(found, 0) + 1
    assert "refused without a name or a remedy" not in seen
    assert seen["refused"] > ROUNDS // 4
    assert seen["encoded"] > ROUNDS // 8


def test_the_seeds_themselves_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "red").save(tmp_path / "p.png")
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(seed) + "\n" for seed in SEEDS), encoding="utf-8")
    samples: list[Sample] = read_jsonl(path)
    assert len(samples) == len(SEEDS)
