"""The work of `qe-edge run` with a model that makes actions."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.models.configuration import load_family
from qe_edge.models.family import Sample
from qe_edge.models.robot import as_state
from qe_edge.runtime.actions import ActionEngine, check_steps
from qe_edge.runtime.manifest import MANIFEST
from qe_edge.system.errors import ArtifactError, InputError, QEError
from qe_edge.system.json_files import read_json_table
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import run_in_torch
else:
    run_in_torch = lazy_module("qe_edge.cli.run_in_torch")

ACTION = "action"  # the graph that only they have
DIGITS = 7  # of a printed number


def acts(folder: Path) -> bool:
    """Whether a folder that can be run is of a model that makes actions."""
    if is_checkpoint(folder):
        return load_family(str(folder), ArtifactError).acts
    try:
        graphs = read_json_table(folder / MANIFEST).get("graphs")
    except QEError:  # whoever opens it says what is wrong with it
        return False
    return isinstance(graphs, dict) and ACTION in graphs


@dataclass(frozen=True)
class Robot:
    """What is said about a robot on the command line.

    Attributes:
        state: Its state.
        steps: Steps of denoising.
        seed: Of the noise.
    """

    state: tuple[float, ...] | None
    steps: int | None
    seed: int | None

    def check_absent(self) -> None:
        """Refuse what a model that writes text does not read.

        Raises:
            InputError: Naming an option that was given.
        """
        for name in ("state", "steps", "seed"):
            if getattr(self, name) is not None:
                raise InputError(f"This model makes no actions, and there is --{name}.", f"Leave --{name} out.")


def read_state(text: str | None) -> tuple[float, ...] | None:
    """The numbers of `--state`: with commas between, or as a JSON list.

    Raises:
        InputError: If they are no numbers.

    Example:
        >>> read_state("0.5,-1"), read_state("[0.5, -1]")
        ((0.5, -1.0), (0.5, -1.0))
    """
    if text is None:
        return None
    parts = text.strip().removeprefix("[").removesuffix("]").split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError as error:
        raise InputError("--state holds no numbers with commas between.", "Write --state 0.1,-0.5,2") from error
    return as_state(numbers)


def run(
    folder: Path,
    sample: Sample,
    robot: Robot,
    *,
    accuracy_level: int,
    threads: int | None,
    plugin_library: Path | None,
    max_context: int | None,
) -> None:
    """Print one action a line, in the robot's own numbers, and say how long they took."""
    if max_context is not None:
        raise InputError("A model that makes actions has no context to choose.", "Leave --max-context out.")
    seed, steps = robot.seed or 0, robot.steps
    if is_checkpoint(folder):
        if accuracy_level:
            raise InputError("PyTorch has no accuracy levels.", "Leave --accuracy-level out, or run exported graphs.")
        actions, seconds, count = run_in_torch.act(folder, sample, seed, steps, threads)
    else:
        engine = ActionEngine.load(
            folder, accuracy_level=accuracy_level, threads=threads, plugin_library=plugin_library
        )
        count = check_steps(steps, engine.family.config.num_inference_steps)
        started = time.perf_counter()
        (actions,) = engine.act([sample], seed=seed, steps=steps)
        seconds = time.perf_counter() - started
    for action in actions:
        click.echo(json.dumps(_rounded(action)))
    where = " in PyTorch" if is_checkpoint(folder) else ""
    click.echo(f"{folder}: {len(actions)} actions in {count} steps {1000 * seconds:.1f} ms{where}", err=True)


def _rounded(action: np.ndarray) -> list[Any]:
    return [float(f"{number:.{DIGITS}g}") for number in action]
