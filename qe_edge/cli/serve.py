"""`qe-edge serve`: a deployed model behind OpenAI's HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, plugin_library_option, speed_options, target_option
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import serve_work
else:
    serve_work = lazy_module("qe_edge.cli.serve_work")


@click.command("serve", cls=Command, example="qe-edge serve out --slots 2\ncurl http://127.0.0.1:8000/v1/models")
@click.argument("folder", metavar="ENGINES", type=click.Path(path_type=Path))
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", default=8000, show_default=True, help="Port; 0 for any."
)
@click.option("--name", metavar="NAME", help="Name of the model; the folder's by default.")
@click.option(
    "--slots", type=click.IntRange(1, 1024), metavar="N", default=1, show_default=True, help="Answers at the same time."
)
@click.option(
    "--max-context", type=click.IntRange(min=2), metavar="N", help="Tokens of a prompt and its answer; memory per slot."
)
@click.option(
    "--queue", type=click.IntRange(0, 4096), metavar="N", default=32, show_default=True, help="Requests that may wait."
)
@click.option(
    "--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="File with the key that clients must send."
)
@click.option(
    "--picture-folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Let requests name pictures in this folder.",
)
@click.option(
    "--picture-host",
    "hosts",
    metavar="NAME",
    multiple=True,
    help="Let requests name pictures of this host. Repeatable.",
)
@click.option(
    "--max-request", type=click.IntRange(1, 1024), metavar="MIB", default=32, show_default=True, help="Request's size."
)
@click.option(
    "--timeout",
    type=click.IntRange(min=1),
    metavar="S",
    default=300,
    show_default=True,
    help="Longest answer, waiting included.",
)
@click.option(
    "--grace",
    type=click.IntRange(min=1),
    metavar="S",
    default=30,
    show_default=True,
    help="Time for running answers at the end.",
)
@target_option("Engine to use, where the folder holds several; the first that runs here by default.")
@plugin_library_option()
@speed_options
def command(**choices: Any) -> None:  # noqa: ANN401 - the options above
    """Answer requests of OpenAI's clients: /v1/chat/completions.

    Pictures come as 'data:' addresses. SIGTERM and Ctrl-C end the server when running answers have ended. ENGINES is a
    folder of engines, of ONNX graphs, or the output of 'deploy'. Needs the extra 'server'.
    """
    serve_work.run(**choices)
