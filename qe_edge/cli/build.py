"""`qe-edge build`: ONNX graphs become engines for one target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qe_edge.cli.options import Command, limit_options, output_option, overwrite_option, plugin_options, target_option
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.cli import build_work
else:
    build_work = lazy_module("qe_edge.cli.build_work")


@click.command("build", cls=Command, example="qe-edge build onnx -o engines --target cpu")
@click.argument("onnx", metavar="ONNX", type=click.Path(path_type=Path))
@output_option("Folder for the engines.")
@target_option("What to build for; 'qe-edge doctor' lists the targets.", default="cpu", show_default=True)
@plugin_options
@limit_options
@overwrite_option()
def command(**choices: Any) -> None:  # noqa: ANN401 - the options above
    """Build engines for one target.

    ONNX is a folder of exported graphs, or holds one as ONNX/onnx.
    """
    build_work.run(**choices)
