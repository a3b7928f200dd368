"""What the result of a run depends on, and what differs between two runs, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qe_edge.checkpoint.known_files import part_in_words
from qe_edge.methods import METHODS
from qe_edge.recipes.recipe import Recipe, current_spelling
from qe_edge.system.errors import shown, shown_name
from qe_edge.system.version import VERSION

Record = dict[str, Any]  # as JSON holds it
MOST_REASONS, MOST_CHARACTERS = 4, 400  # in one message


def make_record(parts: Mapping[str, str], recipe: Recipe, environment: Mapping[str, object] | None = None) -> Record:
    """What a run depends on.

    Args:
        parts: Of the model, as `model_parts` returns them.
        recipe: The resolved recipe, with the hash of the calibration data.
        environment: As `current_environment` returns it; None where results of different ones are not mixed.
    """
    record: Record = {"qe_edge": VERSION, "model": dict(parts), "recipe": recipe.model_dump(mode="json")}
    if environment is None:
        return record
    package = METHODS.package(recipe.method)  # of another package: its version decides what a block becomes
    return {**record, "environment": {**environment, **({"method": package} if package else {})}}


def current_environment(device: str) -> dict[str, object]:
    """What the last bits of a result depend on besides: sums are split by threads, and libraries differ."""
    import numpy as np
    import torch
    import transformers

    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "transformers": transformers.__version__,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs in model, recipe, calibration data and version, each in a few words; empty if nothing does."""
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
    """What differs in the environment, each in a few words."""
    old, new = _table(before.get("environment")), _table(now.get("environment"))
    return [f"{key}: {shown_name(old.get(key))} then, {new.get(key)} now" for key in new if old.get(key) != new[key]]


def in_one_line(reasons: Sequence[str]) -> str:
    """The first of several reasons and how many more there are; a damaged record differs in everything."""
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
