"""Files of a model with one value changed: a dry run succeeds or ends in a sentence, whatever the value."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qe_edge.demo import model_path
from qe_edge.models.generation_files import read_generation_config
from qe_edge.system.errors import QEError
from tests.models.model_files import copy_files, plan
from tests.small_models import write_small_dinov2, write_small_llama

MUTATIONS = 56  # of each family; the files hold about 900 values
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    3,
    2_000_000,
    10_000_000,
    2**63,
    10**400,
    0.5,
    -1.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "\x00\x1b[31m",
    "\ud800",
    "../../other",
    "a" * 5000,
    "org/kernel",
    "int8",
    [],
    [1, 2, 3],
    ["a", None],
    {},
    {"a": {"b": [{}]}},
    [[[[[]]]]],
)
STRANGE_KEYS = ("get_text_config", "__class__", "per_layer_config", "num_labels", "rope_scaling", "tokenizer_object")
FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "generation_config.json",
)
Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_internvl: Path) -> dict[str, Path]:
    """A folder of each family with every key of its configuration written out and every optional file."""
    root = tmp_path_factory.mktemp("mutations")
    found = {
        "qwen2_vl": copy_files(model_path(), root / "qwen2_vl"),
        "internvl": copy_files(tiny_internvl, root / "internvl"),
        "llama": write_small_llama(root / "llama"),
        "dinov2": write_small_dinov2(root / "dinov2"),
    }
    for folder in found.values():
        values = AutoConfig.from_pretrained(folder).to_dict()
        (folder / "config.json").write_text(json.dumps(values, default=str), encoding="utf-8")
    folder = found["qwen2_vl"]
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    for name, table in {
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]},
        "added_tokens.json": {"<|im_end|>": 2},
        "chat_template.json": {"chat_template": template},
        "processor_config.json": {"image_processor": processor},
    }.items():
        (folder / name).write_text(json.dumps(table), encoding="utf-8")
    return found


@pytest.mark.parametrize("family", ["qwen2_vl", "internvl", "llama", "dinov2"])
def test_a_changed_value_is_taken_or_refused_in_a_sentence(
    models: dict[str, Path], tmp_path: Path, family: str
) -> None:
    draws = random.Random(family)
    tables = {
        name: json.loads((models[family] / name).read_text(encoding="utf-8"))
        for name in FILES
        if (models[family] / name).exists()
    }
    folder = copy_files(models[family], tmp_path / "model")
    refused: list[tuple[str, Place, QEError]] = []
    for name, place, table in _mutations(draws, tables):
        (folder / name).write_text(json.dumps(table), encoding="utf-8")
        try:
            plan(folder, family)
            read_generation_config(str(folder))
        except QEError as error:
            refused.append((name, place, error))
        (folder / name).write_text(json.dumps(tables[name]), encoding="utf-8")
    plan(folder, family)  # the files themselves are sound
    assert MUTATIONS / 4 < len(refused) < MUTATIONS
    for name, place, error in refused:
        assert error.remedy, (name, place)
        assert str(error).isprintable(), (name, place)
        assert len(str(error)) < 1000, (name, place)


def _mutations(draws: random.Random, tables: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Place, dict[str, Any]]]:
    """Files with one value dropped, replaced, scaled or added, the same at every run."""
    for _ in range(MUTATIONS):
        name = draws.choice(sorted(tables))
        table = copy.deepcopy(tables[name])
        place = draws.choice(list(_places(table)))
        parent: Any = table
        for part in place[:-1]:
            parent = parent[part]
        how, old = draws.random(), parent[place[-1]]
        if how < 0.15:
            del parent[place[-1]]
        elif how < 0.25 and isinstance(parent, dict):
            parent[draws.choice(STRANGE_KEYS)] = draws.choice(VALUES)
        elif how < 0.45 and isinstance(old, int | float):
            parent[place[-1]] = draws.choice([old * 2, -old, old + 1, old * 10**6, str(old), [old]])
        else:
            parent[place[-1]] = draws.choice(VALUES)
        yield name, place, table


def _places(node: object, place: Place = ()) -> Iterator[Place]:
    """Paths to all values, of long lists and of vocabularies only the first."""
    if place:
        yield place
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for number, (key, child) in enumerate(children):
        if number < 3 or ("vocab" not in place and "merges" not in place):
            yield from _places(child, (*place, key))
