"""`qe-edge predict`: what a device should need for a model, from a roofline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import predict_work
else:
    predict_work = lazy_module("qe_edge.cli.predict_work")


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
def command(**choices: Any) -> None:  # noqa: ANN401 - the options above
    """Predict latency on a device.

    MODEL is 'demo', a folder with a config.json, or one of qwen2-vl-2b, -7b and -72b and internvl2-2b and -8b, of
    which 'quantize' refuses the last two. Times come from launches, latencies, bytes, tensor cores and the instruction
    counts of the compiled kernels. The model of the kernels was fitted to measurements on an H100; the times of other
    devices were never compared with any.
    """
    predict_work.run(**choices)
