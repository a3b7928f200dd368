"""`qe-edge deploy`: everything from the model to the report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from qe_edge.cli.limits import read_limits
from qe_edge.cli.options import (
    LIMITS,
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
from qe_edge.cli.outputs import check_apart_from_sources, check_output_folder, check_output_path, check_writable
from qe_edge.cli.plugin import print_plugin_nodes, read_plugin
from qe_edge.cli.recipes import read_recipe


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
def command(  # noqa: PLR0913 - an argument for every option
    *,
    model: str,
    output: Path,
    target: tuple[str, ...],
    plugin: bool,
    plugin_library: Path | None,
    device: str,
    evaluation: str,
    limit: int | None,
    resume: bool,
    overwrite: bool,
    **choices: Any,  # noqa: ANN401 - the recipe's options, and the limits of engines
) -> None:
    """Do everything, from the model to the report.

    MODEL is 'demo', a folder or a hub id. It is quantized, exported, built for every target and validated; the stages'
    outputs lie in one folder, where the other commands find them. --plugin is for the TensorRT targets among them.
    """
    from qe_edge.deploy.layout import DEFAULT_TARGETS, Layout, hold_deployment, is_deployment
    from qe_edge.export.targets import check_targets

    targets = tuple(dict.fromkeys(target)) or DEFAULT_TARGETS
    check_output_path(output)
    check_writable(output / "inside" if output.is_dir() else output)
    sizes = {name: choices.pop(name) for name in LIMITS}
    recipe = read_recipe(**choices)
    check_targets(targets)
    limits = read_limits(targets, sizes)
    library = read_plugin(targets, plugin, plugin_library)
    check_apart_from_sources(output, model, recipe.calibration.source, evaluation)
    with hold_deployment(output):
        check_output_folder(output, is_deployment, overwrite=overwrite, resume=resume, renamed=False)
        from qe_edge.cli.deploy_work import carry_out, prepare, print_summary

        order = prepare(model, recipe, targets, library, limits, evaluation, limit)
        report = carry_out(order, output, resume=resume, device=device)
    print_summary(report)
    if library is not None:
        print_plugin_nodes([Layout(output).engines / name for name in targets])
    click.echo(f"Wrote '{output}'; look at '{output / 'report.html'}'.")
    click.echo(f'Next: qe-edge run {shlex.quote(str(output))} --image FILE --prompt "What is this?"')
