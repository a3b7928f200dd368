"""`qe-edge predict`: what a device should need for a model, from a roofline."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command

if TYPE_CHECKING:
    from qe_edge.predict.roofline import Prediction, Request
    from qe_edge.predict.variants import Way

PHASES = {"visual": "Picture of {patches} patches", "prefill": "Prompt of {prompt} tokens", "decode": "One token more"}


@click.command("predict", cls=Command, example="qe-edge predict qwen2-vl-2b --device orin-agx")
@click.argument("model")
@click.option("--device", metavar="NAME", required=True, help="For example orin-agx; a name that is unknown lists all.")
@click.option("--scheme", metavar="NAME", default="w4a8", show_default=True, help="Scheme of the quantized model.")
@click.option("--patches", type=click.IntRange(1), metavar="N", default=1024, show_default=True, help="Of the picture.")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), metavar="N", default=1024, show_default=True, help="To prefill."
)
@click.option("--context", type=click.IntRange(1), metavar="N", default=1024, show_default=True, help="Tokens cached.")
@click.option(
    "--cuda-graph", is_flag=True, help="Launch kernels from a CUDA graph, which QE-Edge's runtime does not yet."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: str,
    device: str,
    scheme: str,
    patches: int,
    prompt_tokens: int,
    context: int,
    cuda_graph: bool,
    as_json: bool,
) -> None:
    """Predict latency on a device.

    MODEL is 'demo', a folder with a config.json, or one of qwen2-vl-2b, -7b and -72b and internvl2-2b and -8b, of
    which 'quantize' refuses the last two. Times come from launches, latencies, bytes, tensor cores and the instruction
    counts of the compiled kernels. The model of the kernels was fitted to measurements on an H100; the times of other
    devices were never compared with any.
    """
    from qe_edge.numerics.schemes import get_scheme
    from qe_edge.predict.roofline import Request, predict
    from qe_edge.predict.shapes import find_model
    from qe_edge.predict.tables import get_device

    request = Request(
        shape=find_model(model),
        device=get_device(device),
        scheme=get_scheme(scheme),
        patches=patches,
        prompt=prompt_tokens,
        context=context,
        launches="graph" if cuda_graph else "stream",
    )
    predictions = predict(request)
    if as_json:
        click.echo(json.dumps(_json(request, device, predictions), indent=2))
    else:
        _print(request, predictions)


def _json(request: Request, device: str, predictions: dict[str, dict[Way, Prediction]]) -> dict[str, Any]:
    from qe_edge.predict.roofline import weight_bytes
    from qe_edge.predict.tables import accuracy, device_table, timing_table
    from qe_edge.predict.variants import WAYS

    table = device_table()
    return {
        "kind": "predicted",
        "measured": False,
        "model": request.shape.title,
        "quantize_refuses": request.shape.refused or None,
        "device": {"name": device, **request.device.model_dump()},
        "scheme": request.scheme.name,
        "adapters": asdict(request.adapters),
        "patches": request.patches,
        "prompt": request.prompt,
        "context": request.context,
        "launches": request.launches,
        "assumptions": {"other_launches": table.other_launches, "other_cycles": table.other_cycles},
        "timing": timing_table().model_dump(),
        "accuracy": {**accuracy().model_dump(), "this_device": request.device.measured},
        "weight_bytes": {way: weight_bytes(request, way) for way in WAYS},
        "predicted": {
            phase: {way: asdict(prediction) for way, prediction in ways.items()} for phase, ways in predictions.items()
        },
    }


def _print(request: Request, predictions: dict[str, dict[Way, Prediction]]) -> None:
    from qe_edge.cli.tables import print_table
    from qe_edge.predict.roofline import weight_bytes
    from qe_edge.predict.tables import accuracy
    from qe_edge.predict.variants import TITLES, WAYS

    click.echo(f"{request.shape.title} on {request.device.title}, {request.scheme.name}: predicted, not measured")
    rows = []
    for phase, ways in predictions.items():
        name = PHASES[phase].format(patches=request.patches, prompt=request.prompt)
        for way in WAYS:
            row = ways[way]
            rows.append((
                name,
                TITLES[way],
                f"{row.milliseconds:.2f}",
                f"{ways['fp16'].milliseconds / row.milliseconds:.2f}",
                f"{row.launch_milliseconds:.2f}",
                f"{row.work.launches:.0f}",
                f"{row.work.bytes / 2**20:.0f}",
                f"{row.work.instructions / 1e6:.0f}" if row.work.instructions else "",
                row.bound,
            ))  # fmt: skip
            name = ""
    head = ("", "", "Predicted ms", "x FP16", "of it launches", "Launches", "MiB", "M warp instr.", "Mostly bound by")
    print_table(head, rows)
    room = request.device.memory_gib * 2**30
    for way in WAYS:
        if weight_bytes(request, way) > room:
            click.echo(f"{TITLES[way]} does not fit into {request.device.memory_gib:g} GiB.")
    how = "a CUDA graph" if request.launches == "graph" else "a stream"
    click.echo(f"Assumed: {getattr(request.device.launch_us, request.launches):g} us a launch in {how}.")
    known = accuracy()
    click.echo(
        f"Linear layers on {known.device}: half of {known.rows} measured times lie within {known.median - 1:.0%} of "
        f"the prediction, nine of ten within {known.nine_of_ten - 1:.0%}; attention and whole models were not measured."
    )
    if request.shape.refused:
        click.echo(f"'qe-edge quantize' refuses this model: {request.shape.refused.rstrip('.')}.")
    if not request.device.measured:
        click.echo(f"{request.device.title}: not yet run on hardware; use the ratios, not the milliseconds.")
