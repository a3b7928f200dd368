"""`qe-edge build`: ONNX graphs become engines for one target."""

from __future__ import annotations

from pathlib import Path

import click

from qe_edge.cli.options import Command, output_option, overwrite_option, plugin_library_option, target_option


@click.command("build", cls=Command, example="qe-edge build onnx -o engines --target cpu")
@click.argument("onnx", metavar="ONNX", type=click.Path(path_type=Path))
@output_option("Folder for the engines.")
@target_option("What to build for; 'qe-edge doctor' lists the targets.", default="cpu", show_default=True)
@click.option("--plugin", is_flag=True, help="Run quantized layers in the TensorRT plugin; not yet run on hardware.")
@plugin_library_option()
@overwrite_option()
def command(onnx: Path, output: Path, target: str, plugin: bool, plugin_library: Path | None, overwrite: bool) -> None:
    """Build engines for one target.

    ONNX is a folder of exported graphs, or holds one as ONNX/onnx.
    """
    from qe_edge.cli.inputs import find_onnx, is_manifest_folder
    from qe_edge.cli.outputs import check_disk, check_output_folder, folder_bytes
    from qe_edge.deploy import check_targets

    check_targets([target])
    library = _plugin_library(target, plugin_library) if plugin or plugin_library else None
    source = find_onnx(onnx)
    check_output_folder(output, is_manifest_folder, overwrite=overwrite)
    check_disk(output, folder_bytes(source))
    from qe_edge.console import ConsoleProgress
    from qe_edge.export.build import build_engines

    built = build_engines(source, output, target, plugin_library=library, progress=ConsoleProgress())
    if library is not None:
        _print_plugin_nodes(built)
    click.echo(f"Wrote '{built}'. Next: qe-edge run {output} --image FILE --prompt \"What is this?\"")


def _plugin_library(target: str, chosen: Path | None) -> Path:
    """The library to build with, checked before any work."""
    from qe_edge.export.build import check_plugin_target
    from qe_edge.export.targets import get_target
    from qe_edge.runtime.plugin_library import find_plugin_library

    check_plugin_target(get_target(target))
    return find_plugin_library(chosen)


def _print_plugin_nodes(folder: Path) -> None:
    """How many nodes of every graph the plugin runs, and how many of them the engine's layer list shows."""
    from qe_edge.runtime.engine_info import read_engine_info

    info = read_engine_info(folder)
    for name, graph in info.graphs.items() if info else ():
        nodes, listed = len(graph.plugin_nodes), len(graph.plugin_layers)
        click.echo(f"{name}: {nodes} plugin nodes, {listed} of them in the engine's layer list")
    click.echo("Engines with the plugin have not yet run on hardware.")
