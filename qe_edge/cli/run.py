"""`qe-edge run`: one question to a deployed model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, plugin_library_option, speed_options, target_option

if TYPE_CHECKING:
    from qe_edge.models.family import Sample
    from qe_edge.runtime.answers import Timings


@click.command("run", cls=Command, example='qe-edge run out --image picture.png --prompt "What is this?"')
@click.argument("folder", metavar="ENGINES", type=click.Path(path_type=Path))
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    metavar="FILE",
    multiple=True,
    help="Picture; without one, text only. May be repeated: several pictures stand before the prompt in this order.",
)
@click.option("--prompt", metavar="TEXT", required=True, help="Question or instruction.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), metavar="N", default=64, show_default=True, help="Longest answer."
)
@click.option(
    "--max-context",
    type=click.IntRange(min=2),
    metavar="N",
    help="Most tokens of prompt and answer together; what the model or its engines take by default.",
)
@target_option("Engine to use, where the folder holds several; the first that runs here by default.")
@plugin_library_option()
@speed_options
def command(
    *,
    folder: Path,
    images: tuple[Path, ...],
    prompt: str,
    max_tokens: int,
    target: str | None,
    accuracy_level: str,
    **opening: Any,  # noqa: ANN401 - plugin_library, threads and max_context, as the engine takes them
) -> None:
    """Answer a question about a picture, or about several.

    The answer goes to standard output, the timings to standard error. ENGINES is a folder of engines, of ONNX
    graphs, a quantized checkpoint (run in PyTorch), or the output of 'deploy'. Decoding is greedy: the rules of
    generation_config.json hold, its sampling has no effect.
    """
    from qe_edge.checkpoint.detection import is_checkpoint
    from qe_edge.cli.inputs import find_runnable
    from qe_edge.models.family import Sample
    from qe_edge.models.images import open_image
    from qe_edge.runtime.provenance import check_deployment
    from qe_edge.system.errors import InputError

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
        _answer_in_torch(found, sample, max_tokens, opening["threads"])
        return
    from qe_edge.runtime.engine import VisionLanguageEngine
    from qe_edge.runtime.pipeline import Pipeline

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


def _answer_in_torch(folder: Path, sample: Sample, max_tokens: int, threads: int | None) -> None:
    """The quantized checkpoint itself, computed in float32."""
    import torch

    from qe_edge.models.quantized import load_quantized
    from qe_edge.validate.subjects import TorchSubject, in_float32

    if threads is not None:
        torch.set_num_threads(threads)
    loaded = in_float32(load_quantized(folder))
    started = time.perf_counter()
    encoded = loaded.family.encode(loaded.processor, [sample])
    (ids,) = TorchSubject(loaded, name="the quantized model").generate_ids(encoded, max_tokens)
    click.echo(loaded.processor.tokenizer.decode(ids, skip_special_tokens=True).strip())
    click.echo(f"{folder}: {_ms(time.perf_counter() - started)} in PyTorch", err=True)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
