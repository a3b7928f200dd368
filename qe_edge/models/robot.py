"""A robot's state and actions: read from anybody's numbers, and normalized as a model has them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qe_edge.models.guard import check_values
from qe_edge.models.model_files import find_file
from qe_edge.system.errors import InputError, ModelError, shown
from qe_edge.system.json_files import read_json_table

PROCESSOR = "processor_config.json"
REMEDY = "Write state_mean, state_std, actions_mean and actions_std of the robot's data set into it."
SMALLEST = 1e-8  # that transformers adds to a deviation
MOST = 1 << 16  # actions of a sample
Mean = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]
Numbers = tuple[float, ...]


class _Values(BaseModel):
    """The part of processor_config.json that is about a robot."""

    model_config = ConfigDict(extra="ignore")
    state_mean: Annotated[list[Mean], Field(min_length=1, max_length=4096)]
    state_std: Annotated[list[Deviation], Field(min_length=1, max_length=4096)]
    actions_mean: Annotated[list[Mean], Field(min_length=1, max_length=4096)]
    actions_std: Annotated[list[Deviation], Field(min_length=1, max_length=4096)]

    @model_validator(mode="after")
    def _paired(self) -> _Values:
        for name in ("state", "actions"):
            mean, deviation = (len(getattr(self, f"{name}_{part}")) for part in ("mean", "std"))
            if mean != deviation:
                raise ValueError(f"{name}_mean has {mean} numbers and {name}_std {deviation}")
        return self


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of each of a robot's numbers over the data that a model was trained on.

    Attributes:
        mean: One number for each.
        std: Likewise.

    Example:
        >>> statistics = Statistics((1.0, 0.0), (2.0, 1.0))
        >>> statistics.normalized(np.array([[3.0, 4.0]]), width=3).round(4).tolist()
        [[1.0, 4.0, 0.0]]
        >>> statistics.restored(np.array([[1.0, 4.0, 0.0]])).round(4).tolist()
        [[3.0, 4.0]]
    """

    mean: Numbers
    std: Numbers

    def normalized(self, values: np.ndarray, width: int) -> np.ndarray:
        """Robot's numbers `[..., n]` as a model reads them, float32 `[..., width]`: zeros follow them."""
        numbers = (values.astype(np.float32) - np.asarray(self.mean, np.float32)) / self._scale
        room = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
        return np.pad(numbers, room).astype(np.float32)

    def restored(self, values: np.ndarray) -> np.ndarray:
        """A model's numbers `[..., width]` as the robot's, float32 `[..., n]`."""
        restored: np.ndarray = values[..., : len(self.mean)] * self._scale + np.asarray(self.mean, np.float32)
        return restored

    @property
    def _scale(self) -> np.ndarray:
        scale: np.ndarray = np.asarray(self.std, np.float32) + np.float32(SMALLEST)
        return scale


@dataclass(frozen=True)
class RobotProcessor:
    """Tokenizer, image processor, and what normalizes a robot's numbers.

    Attributes:
        tokenizer: Of transformers.
        image_processor: Of transformers.
        state: Statistics of states.
        actions: Statistics of actions.
    """

    tokenizer: Any
    image_processor: Any
    state: Statistics
    actions: Statistics

    def save(self, folder: Path) -> None:
        """Write everything into a folder, under transformers' own names."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        every = {"state": self.state, "actions": self.actions}
        values: dict[str, Any] = {f"{name}_mean": list(found.mean) for name, found in every.items()}
        values |= {f"{name}_std": list(found.std) for name, found in every.items()}
        (folder / PROCESSOR).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_statistics(source: str, state_width: int, action_width: int) -> tuple[Statistics, Statistics]:
    """Statistics of states and of actions from a model's processor_config.json.

    Args:
        source: Folder or hub id.
        state_width: Most numbers of a state.
        action_width: Most numbers of an action.

    Raises:
        ModelError: If the file is missing, lacks them, or has more numbers than the model reads.

    Example:
        >>> state, actions = read_statistics("my-pi0", 32, 32)  # doctest: +SKIP
        >>> len(state.mean), len(actions.mean)  # doctest: +SKIP
    """
    path = find_file(source, PROCESSOR)
    if path is None:
        raise ModelError(f"'{source}' has no {PROCESSOR}, which says how a robot's numbers are normalized.", REMEDY)
    values = check_values(_Values, read_json_table(path, error=ModelError, remedy=REMEDY), path, REMEDY, ModelError)
    found = []
    for name, width in (("state", state_width), ("actions", action_width)):
        mean, deviation = (tuple(getattr(values, f"{name}_{part}")) for part in ("mean", "std"))
        if len(mean) > width:
            raise ModelError(
                f"In {PROCESSOR} of '{source}' {name}_mean has {len(mean)} numbers; the model reads {width}.",
                f"Copy {PROCESSOR} and config.json from the same model.",
            )
        found.append(Statistics(mean, deviation))
    return found[0], found[1]


def as_state(values: object) -> Numbers:
    """A robot's state as a tuple of floats.

    Raises:
        InputError: If it is no list of finite numbers.

    Example:
        >>> as_state(np.array([0.5, 1.0]))
        (0.5, 1.0)
        >>> as_state([0.5, float("nan")])
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: A robot's state holds nan. Give a list of finite numbers.
    """
    return _numbers(values, "A robot's state")


def as_actions(values: object) -> tuple[Numbers, ...]:
    """A robot's next actions, one after the other, as tuples of floats.

    Raises:
        InputError: If they are no list of lists of finite numbers, all of one length.

    Example:
        >>> as_actions([[0, 1], [2, 3]])
        ((0.0, 1.0), (2.0, 3.0))
    """
    given = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(given, list | tuple) or not 0 < len(given) <= MOST:
        raise InputError("A robot's actions are no list of actions.", "Give a list with a list of numbers for each.")
    rows = tuple(_numbers(row, "An action of a robot") for row in given)
    if len({len(row) for row in rows}) > 1:
        raise InputError("A robot's actions have different numbers of values.", "Give as many for each of them.")
    return rows


def _numbers(values: object, what: str) -> Numbers:
    given = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(given, list | tuple) or not 0 < len(given) <= MOST:
        raise InputError(f"{what} is {shown(given)}, no list of numbers.", "Give a list of finite numbers.")
    for value in given:
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not isfinite(value):
            raise InputError(f"{what} holds {shown(value)}.", "Give a list of finite numbers.")
    return tuple(float(value) for value in given)


def times(steps: int) -> np.ndarray:
    """Times of denoising, float32 `[steps]`: from 1, which is noise, down to the last one before 0.

    Example:
        >>> times(4).tolist()
        [1.0, 0.75, 0.5, 0.25]
    """
    return np.array([1.0 + step * (-1.0 / steps) for step in range(steps)], np.float32)
