"""The work of `qe-edge predict`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from qe_edge.cli.tables import print_table
from qe_edge.numerics.schemes import get_scheme
from qe_edge.predict.roofline import Prediction, Request, predict, weight_bytes
from qe_edge.predict.shapes import find_model
from qe_edge.predict.tables import accuracy, device_table, get_device, timing_table
from qe_edge.predict.variants import TITLES, WAYS, Way

PHASES = {"visual": "Picture of {patches} patches", "prefill": "Prompt of {prompt} tokens", "decode": "One token more"}


def run(
    *,
    model: str,
    device: str,
    scheme: str,
    patches: int,
    prompt_tokens: int,
    context: int,
    cuda_graph: bool,
    as_json: bool,
) -> None:
    """Predict, and print; arguments as the command's."""
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
