"""The work of `qe-edge run`; without PyTorch, except for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.checkpoint.detection import is_checkpoint
from qe_edge.cli.inputs import find_runnable
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.runtime.answers import Timings
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.runtime.provenance import check_deployment
from qe_edge.system.errors import InputError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import run_in_torch
else:
    run_in_torch = lazy_module("qe_edge.cli.run_in_torch")


def run(
    *,
    folder: Path,
    images: tuple[Path, ...],
    prompt: str,
    max_tokens: int,
    target: str | None,
    accuracy_level: str,
    **opening: Any,  # noqa: ANN401 - plugin_library, threads and max_context, as the engine takes them
) -> None:
    """Answer, and say how long it took; arguments as the command's."""
    sample = Sample([open_image(image) for image in images], prompt)
    found = find_runnable(folder, target)
    check_deployment(folder, found)
    if is_checkpoint(found):
        if accuracy_level != "0":
            raise InputError("PyTorch has no accuracy levels.", "Leave --accuracy-level out, or run exported graphs.")
        if opening["max_context"] is not None:
            raise InputError(
                "PyTorch has no cache of a fixed size.", "Leave --max-context out, or run exported graphs."
            )
        text, seconds = run_in_torch.answer(found, sample, max_tokens, opening["threads"])
        click.echo(text)
        click.echo(f"{found}: {_ms(seconds)} in PyTorch", err=True)
        return
    engine = VisionLanguageEngine.load(found, accuracy_level=int(accuracy_level), **opening)
    pipeline = Pipeline(engine)
    timings: Timings | None = None
    for piece in pipeline(sample, stream=True, max_new_tokens=max_tokens, temperature=0):
        click.echo(piece.text, nl=False)
        timings = piece.timings
    click.echo()
    if timings is not None:
        cache = f"KV cache for {pipeline.slot_tokens} tokens {pipeline.slot_bytes / 2**20:.1f} MiB"
        click.echo(f"{found}: {', '.join([*_spent(timings, len(sample.pictures)), cache])}", err=True)


def _spent(timings: Timings, pictures: int) -> list[str]:
    """Where the time of an answer went, in words."""
    lines = [f"prompt of {timings.prompt_tokens} tokens {_ms(timings.prefill)}"]
    if pictures:
        lines.insert(0, f"{'picture' if pictures == 1 else 'pictures'} {_ms(timings.visual + timings.merger)}")
    lines.append(f"first token after {_ms(timings.first_token)}")
    if timings.answer_tokens:
        lines.append(f"{timings.answer_tokens} tokens {_ms(timings.decode / timings.answer_tokens)} each")
    return lines


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
