"""`qe-edge run`: one question to a deployed model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qe_edge.cli.options import Command, plugin_library_option, speed_options, target_option

if TYPE_CHECKING:
    from qe_edge.models.family import Sample
    from qe_edge.runtime.engine import VisionLanguageEngine


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
@target_option("Engine to use, where the folder holds several; the first that runs here by default.")
@plugin_library_option()
@speed_options
def command(
    folder: Path,
    images: tuple[Path, ...],
    prompt: str,
    max_tokens: int,
    target: str | None,
    plugin_library: Path | None,
    threads: int | None,
    accuracy_level: str,
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
        _answer_in_torch(found, sample, max_tokens, threads)
        return
    from qe_edge.runtime.engine import VisionLanguageEngine

    timings: list[str] = []
    engine = VisionLanguageEngine.load(
        found, plugin_library=plugin_library, threads=threads, accuracy_level=int(accuracy_level)
    )
    for text in stream_answer(engine, sample, max_tokens, timings):
        click.echo(text, nl=False)
    click.echo()
    click.echo(f"{found}: {', '.join(timings)}", err=True)


def stream_answer(engine: VisionLanguageEngine, sample: Sample, max_tokens: int, timings: list[str]) -> Iterator[str]:
    """The answer piece by piece; `timings` receives a line for every step."""
    import numpy as np

    tokenizer = engine.processor.tokenizer
    started = time.perf_counter()
    encoded = engine.encode([sample])
    engine.check_length(encoded, max_tokens)
    looked = time.perf_counter()
    features = engine.features(encoded)
    read = time.perf_counter()
    logits, state = engine.prefill(encoded, features, max_tokens)
    first = time.perf_counter()
    ids: list[int] = []
    shown = ""
    while len(ids) < max_tokens:
        token = int(engine.next_tokens(logits, state)[0])
        if token in engine.manifest.eos_token_ids:
            break
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character whose last bytes are still to come
            yield text[len(shown) :]
            shown = text
        if len(ids) < max_tokens:
            logits = engine.decode(state, np.array([token]))
    yield tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]  # bytes that never became a character
    ended = time.perf_counter()
    if encoded.pixels:
        timings.append(f"{'picture' if len(sample.pictures) == 1 else 'pictures'} {_ms(read - looked)}")
    timings.append(f"prompt of {encoded.input_ids.shape[1]} tokens {_ms(first - read)}")
    timings.append(f"first token after {_ms(first - started)}")
    if ids:
        timings.append(f"{len(ids)} tokens {_ms((ended - first) / len(ids))} each")


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
