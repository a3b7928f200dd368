"""The work of `qe-edge bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.calibration.sources import load_evaluation
from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import find_engines, open_model
from qe_edge.cli.outputs import human_bytes
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.runtime.provenance import check_deployment
from qe_edge.system.lazy import lazy_module
from qe_edge.validate.energy import Energy
from qe_edge.validate.latency import measure_latency
from qe_edge.validate.schema import Latency

if TYPE_CHECKING:
    from qe_edge.cli import tables
else:  # JSON needs no rich, which machines that only run engines lack
    tables = lazy_module("qe_edge.cli.tables")


def run(
    *,
    folder: Path,
    images: tuple[Path, ...],
    prompt: str,
    original: str | None,
    target: str | None,
    plugin_library: Path | None,
    as_json: bool,
    **limits: Any,  # noqa: ANN401 - threads, max_tokens, seconds, as click has checked them
) -> None:
    """Measure, and print; arguments as the command's."""
    pictures = [open_image(image) for image in images or (_demo_picture(),)]
    engines = find_engines(folder, target)
    check_deployment(folder, engines)
    source = open_model(original) if original else None
    found = measure_latency(
        engines,
        Sample(pictures, prompt),
        original=source,
        plugin_library=plugin_library,
        threads=limits["threads"],
        new_tokens=limits["max_tokens"],
        seconds=limits["seconds"],
        progress=ConsoleProgress(),
    )
    if as_json:
        click.echo(json.dumps([latency.model_dump(mode="json") for latency in found], indent=2))
        return
    _print(found)


def _print(found: Sequence[Latency]) -> None:
    """A row for every runtime: medians of the steps, the slow tokens, and what follows from all."""
    steps = list(dict.fromkeys(step for latency in found for step in latency.steps))
    energies = [latency.measured_energy for latency in found]
    rows = []
    for latency, energy in zip(found, energies, strict=True):
        times = [f"{latency.steps[step].median:.2f}" if step in latency.steps else "" for step in steps]
        decode = latency.steps["decode"]
        slow = [f"{value:.2f}" for value in (decode.p90, decode.p99) if value is not None]
        rate = "" if latency.tokens_per_second is None else f"{latency.tokens_per_second:.1f}"
        used = _energy_cells(energy) if any(energies) else ()
        rows.append((latency.runtime, latency.setting, *times, *slow, rate, *used, human_bytes(latency.peak_bytes)))
    names = [f"{step.replace('_', ' ')} ms" for step in steps]
    joules = ("Answer J", "above idle J", "idle W") if any(energies) else ()
    tables.print_table(
        ("Runtime", "Setting", *names, "decode p90", "decode p99", "Tokens/s", *joules, "Peak memory"), rows
    )
    tokens = found[0].steps["decode"].repeats
    click.echo(
        f"Medians; prompt of {found[0].prompt_tokens} tokens, {tokens} tokens decoded, {found[0].threads} threads."
    )
    _print_rails(found)


def _energy_cells(energy: Energy | None) -> tuple[str, str, str]:
    """Joules of an answer, the same above idle, and watts of the idle board."""
    if energy is None:
        return "", "", ""
    return f"{energy.joules:.3g}", f"{energy.above_idle:.3g}", f"{energy.idle_watts:.3g}"


def _print_rails(found: Sequence[Latency]) -> None:
    """What the energy is of, and why there is none; nothing on a machine without power rails."""
    energies = [latency.measured_energy for latency in found]
    for latency, energy in zip(found, energies, strict=True):
        if energy is not None:
            length = 1 + latency.steps["decode"].repeats // energy.answers
            click.echo(
                f"Energy of an answer of {length} tokens; rails {', '.join(energy.rails)}. It was never checked on a "
                "Jetson."
            )
            break
    notices = [notice for energy in energies if energy is not None for notice in energy.notices]
    problems = [f"No energy. {latency.energy_problem}" for latency in found if latency.energy_problem]
    for line in dict.fromkeys(notices + problems):
        click.echo(line)


def _demo_picture() -> Path:
    picture = load_evaluation("demo")[0].image
    return Path(str(picture))
