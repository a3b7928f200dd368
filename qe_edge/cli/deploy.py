"""`qe-edge deploy`: everything from the model to the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import (
    Command,
    device_option,
    evaluation_options,
    limit_options,
    output_option,
    overwrite_option,
    plugin_options,
    recipe_options,
    resume_option,
    target_option,
)
from qe_edge.cli.outputs import check_output_path, check_writable
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import deploy_work
else:
    deploy_work = lazy_module("qe_edge.cli.deploy_work")


@click.command("deploy", cls=Command, example="qe-edge deploy demo -o out --target cpu --target rtx")
@click.argument("model")
@output_option("Folder for checkpoint, onnx, engines/<target>, report.json and report.html.")
@target_option("What to build for; may be repeated. [default: cpu]", multiple=True)
@plugin_options
@limit_options
@recipe_options
@device_option
@evaluation_options()
@resume_option("Continue a run that was stopped; stages that are complete and were made from the same are kept.")
@overwrite_option()
def command(output: Path, **choices: Any) -> None:  # noqa: ANN401 - the options above
    """Do everything, from the model to the report.

    MODEL is 'demo', a folder or a hub id. It is quantized, exported, built for every target and validated; the stages'
    outputs lie in one folder, where the other commands find them. --plugin is for the TensorRT targets among them.
    """
    check_output_path(output)
    check_writable(output / "inside" if output.is_dir() else output)
    deploy_work.run(output=output, **choices)
