"""`qe-edge bench`: speed and memory of engines on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, plugin_library_option, target_option

if TYPE_CHECKING:
    from qe_edge.validate.schema import Latency


@click.command("bench", cls=Command, example="qe-edge bench engines --image picture.png")
@click.argument("folder", metavar="ENGINES", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Picture to ask about, not the demo's. May be repeated.",
)
@click.option("--prompt", metavar="TEXT", default="What is in the picture?", show_default=True, help="Question to ask.")
@click.option("--original", metavar="MODEL", help="Measure the original model in PyTorch too.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    default=8,
    show_default=True,
    help="Tokens decoded after the first in every repeat.",
)
@click.option(
    "--seconds",
    type=click.IntRange(min=1, max=3600),
    metavar="S",
    default=5,
    show_default=True,
    help="Time after which each runtime stops repeating, but not before three repeats.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads on the CPU; one for each core by default."
)
@target_option("Engine to use, where the folder holds several; the first that runs here by default.")
@plugin_library_option()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    folder: Path,
    images: tuple[Path, ...],
    prompt: str,
    original: str | None,
    target: str | None,
    plugin_library: Path | None,
    as_json: bool,
    **limits: Any,  # noqa: ANN401 - threads, max_tokens, seconds, as click has checked them
) -> None:
    """Measure speed and memory of engines.

    Time to the first token and its parts, time from one token to the next (median, p90, p99), tokens per second and
    peak memory, measured in a process of their own. ENGINES is a folder of engines, of ONNX graphs, or the output of
    'deploy'.
    """
    from qe_edge.cli.inputs import find_engines, open_model
    from qe_edge.models.family import Sample
    from qe_edge.models.images import open_image
    from qe_edge.runtime.provenance import check_deployment

    pictures = [open_image(image) for image in images or (_demo_picture(),)]
    engines = find_engines(folder, target)
    check_deployment(folder, engines)
    source = open_model(original) if original else None
    from qe_edge.cli.console import ConsoleProgress
    from qe_edge.validate.latency import measure_latency

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
    from qe_edge.cli.outputs import human_bytes
    from qe_edge.cli.tables import print_table

    steps = list(dict.fromkeys(step for latency in found for step in latency.steps))
    rows = []
    for latency in found:
        times = [f"{latency.steps[step].median:.2f}" if step in latency.steps else "" for step in steps]
        decode = latency.steps["decode"]
        slow = [f"{value:.2f}" for value in (decode.p90, decode.p99) if value is not None]
        rate = "" if latency.tokens_per_second is None else f"{latency.tokens_per_second:.1f}"
        rows.append((latency.runtime, latency.setting, *times, *slow, rate, human_bytes(latency.peak_bytes)))
    names = [f"{step.replace('_', ' ')} ms" for step in steps]
    print_table(("Runtime", "Setting", *names, "decode p90", "decode p99", "Tokens/s", "Peak memory"), rows)
    tokens = found[0].steps["decode"].repeats
    click.echo(
        f"Medians; prompt of {found[0].prompt_tokens} tokens, {tokens} tokens decoded, {found[0].threads} threads."
    )


def _demo_picture() -> Path:
    from qe_edge.calibration.sources import load_evaluation

    picture = load_evaluation("demo")[0].image
    return Path(str(picture))
