"""The record of a run's inputs, and the differences between two records in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from qe_edge.checkpoint.known_files import part_in_words
from qe_edge.methods import METHODS
from qe_edge.recipes.recipe import Recipe, current_spelling
from qe_edge.system.errors import shown, shown_name
from qe_edge.system.version import VERSION

Record = dict[str, Any]  # as JSON holds it
MOST_REASONS, MOST_CHARACTERS = 4, 400  # in one message


def make_record(parts: Mapping[str, str], recipe: Recipe, environment: Mapping[str, object] | None = None) -> Record:
    """The inputs of a run.

    Args:
        parts: Hashes of the model's parts, as `model_parts` returns them.
        recipe: The resolved recipe, with the hash of the calibration data.
        environment: The result of `current_environment`; None where results of different environments are not mixed.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> record = make_record({"config.json": "e3b0c442"}, make_recipe(method="gptq"))
        >>> record["model"], record["recipe"]["method"]
        ({'config.json': 'e3b0c442'}, 'gptq')
    """
    record: Record = {"qe_edge": VERSION, "model": dict(parts), "recipe": recipe.model_dump(mode="json")}
    if environment is None:
        return record
    package = METHODS.package(recipe.method)  # of another package: its version decides what a block becomes
    return {**record, "environment": {**environment, **({"method": package} if package else {})}}


def current_environment(device: str) -> dict[str, object]:
    """Properties of this machine that change the last bits of a result: sums are split by threads, libraries differ.

    Example:
        >>> sorted(current_environment("cpu"))
        ['device', 'instructions', 'numpy', 'threads', 'torch', 'transformers']
    """
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences in model, recipe, calibration data and version, each in a few words; empty if there is none.

    Example:
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> before = make_record({"config.json": "e3b0c442"}, make_recipe(method="gptq"))
        >>> now = make_record({"config.json": "5feceb66"}, make_recipe(method="gptq", scheme="w4a16"))
        >>> changes(before, now)
        ["configuration: 'config.json' changed", "recipe key 'scheme' was 'w4a8' and is 'w4a16'"]
    """
    found = []
    if before.get("qe_edge") != now["qe_edge"]:
        found.append(f"QE-Edge {shown_name(before.get('qe_edge'))} became {now['qe_edge']}")
    old, new = _table(before.get("model")), _table(now.get("model"))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            how = "is gone" if name not in new else "is new" if name not in old else "changed"
            found.append(f"{part_in_words(shown_name(name))} {how}")
    old, new = dict(_flat(current_spelling(_table(before.get("recipe"))))), dict(_flat(now.get("recipe")))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            if key == "calibration.sha256":
                found.append("the calibration data changed")
            else:
                found.append(f"recipe key '{shown_name(key)}' was {shown(old.get(key))} and is {shown(new.get(key))}")
    return found


def environment_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences in the environment, each in a few words.

    Example:
        >>> environment_changes({"environment": {"threads": 2}}, {"environment": {"threads": 8}})
        ['threads: 2 then, 8 now']
    """
    old, new = _table(before.get("environment")), _table(now.get("environment"))
    return [f"{key}: {shown_name(old.get(key))} then, {new.get(key)} now" for key in new if old.get(key) != new[key]]


def in_one_line(reasons: Sequence[str]) -> str:
    """The first of several reasons, and the number of others: a damaged record differs in everything.

    Example:
        >>> in_one_line(["a changed", "b changed", "c changed", "d changed", "e changed"])
        'a changed; b changed; c changed; d changed; and 1 more'
    """
    kept = list(reasons[:MOST_REASONS])
    while len(kept) > 1 and len("; ".join(kept)) > MOST_CHARACTERS:
        kept.pop()
    more = len(reasons) - len(kept)
    return "; ".join([*kept, *([f"and {more} more"] if more else [])])


def _flat(values: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and values of nested tables."""
    for key, value in _table(values).items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(values: object) -> dict[str, Any]:
    return values if isinstance(values, dict) else {}
