"""`qe-edge bench`: speed, memory and energy of engines on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, plugin_library_option, target_option
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import bench_work
else:
    bench_work = lazy_module("qe_edge.cli.bench_work")


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
def command(**choices: Any) -> None:  # noqa: ANN401 - the options above
    """Measure speed, memory and energy of engines.

    Time to the first token and its parts, time from one token to the next (median, p90, p99), tokens per second and
    peak memory, measured in a process of their own. On a Jetson also the energy of an answer, from the board's power
    rails; this has not yet run on a Jetson. ENGINES is a folder of engines, of ONNX graphs, or the output of
    'deploy'.
    """
    bench_work.run(**choices)
