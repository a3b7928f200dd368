"""The work of `qe-edge serve`; needs the extra `server`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.cli.inputs import find_runnable
from qe_edge.cli.outputs import human_bytes
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.runtime.provenance import check_deployment
from qe_edge.server.serving import listen, serve
from qe_edge.server.settings import ServerSettings, read_api_key
from qe_edge.system.errors import InputError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def run(folder: Path, target: str | None, plugin_library: Path | None, **options: Any) -> None:  # noqa: ANN401
    """Check, load and serve until a signal; arguments as the command's."""
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
