"""`qe-edge serve`: a deployed model behind OpenAI's HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, plugin_library_option, speed_options, target_option

if TYPE_CHECKING:
    from qe_edge.server.settings import ServerSettings

LOOPBACK = ("127.0.0.1", "::1", "localhost")


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
def command(folder: Path, target: str | None, plugin_library: Path | None, **options: Any) -> None:  # noqa: ANN401
    """Answer requests of OpenAI's clients: /v1/chat/completions.

    Pictures come as 'data:' addresses. SIGTERM and Ctrl-C end the server when running answers have ended. ENGINES is a
    folder of engines, of ONNX graphs, or the output of 'deploy'. Needs the extra 'server'.
    """
    from qe_edge.checkpoint.detection import is_checkpoint
    from qe_edge.cli.inputs import find_runnable
    from qe_edge.cli.outputs import human_bytes
    from qe_edge.runtime.engine import VisionLanguageEngine
    from qe_edge.runtime.pipeline import Pipeline
    from qe_edge.runtime.provenance import check_deployment
    from qe_edge.system.errors import InputError, TargetError

    try:
        from qe_edge.server.serving import listen, serve
    except ModuleNotFoundError as error:
        raise TargetError(
            f"The server needs the Python package {error.name}, which is not installed.",
            'Run: pip install "qe-edge[server]".',
        ) from error
    found = find_runnable(folder, target)
    check_deployment(folder, found)
    if is_checkpoint(found):
        raise InputError(f"'{found}' is a checkpoint, which only PyTorch runs.", "Export it with 'qe-edge export'.")
    settings = _settings(options, folder.resolve().name)
    with listen(options["host"], options["port"]) as listening:
        if settings.api_key is None and options["host"] not in LOOPBACK:
            click.echo("Note: whoever reaches this address may ask; --api-key-file lets only some.", err=True)
        engine = VisionLanguageEngine.load(
            found,
            plugin_library=plugin_library,
            threads=options["threads"],
            accuracy_level=int(options["accuracy_level"]),
            max_context=options["max_context"],
        )
        pipeline = Pipeline(engine, slots=options["slots"])
        each = f"{pipeline.slot_tokens} tokens, with a KV cache of {human_bytes(pipeline.slot_bytes)}"
        click.echo(f"{found}: {pipeline.slots} {'slot' if pipeline.slots == 1 else 'slots'} of {each}", err=True)
        serve(pipeline, settings, listening, lambda address: click.echo(f"{settings.model}: {address}"))


def _settings(options: dict[str, Any], name: str) -> ServerSettings:
    """Limits of the server, checked before the model is loaded."""
    from qe_edge.server.settings import ServerSettings, read_api_key
    from qe_edge.system.errors import InputError

    pictures, key = options["picture_folder"], options["api_key_file"]
    if pictures is not None and not pictures.is_dir():
        raise InputError(f"There is no folder '{pictures}'.", "Correct --picture-folder.")
    return ServerSettings(
        model=options["name"] or name,
        api_key=None if key is None else read_api_key(key),
        queue=options["queue"],
        max_request_bytes=options["max_request"] << 20,
        answer_seconds=options["timeout"],
        grace_seconds=options["grace"],
        picture_folder=pictures,
        picture_hosts=tuple(host.lower() for host in options["hosts"]),
    )
