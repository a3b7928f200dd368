"""`qe-edge build`: ONNX graphs become engines for one target."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from qe_edge.cli.options import Command, limit_options, output_option, overwrite_option, plugin_options, target_option


@click.command("build", cls=Command, example="qe-edge build onnx -o engines --target cpu")
@click.argument("onnx", metavar="ONNX", type=click.Path(path_type=Path))
@output_option("Folder for the engines.")
@target_option("What to build for; 'qe-edge doctor' lists the targets.", default="cpu", show_default=True)
@plugin_options
@limit_options
@overwrite_option()
def command(
    onnx: Path,
    output: Path,
    target: str,
    plugin: bool,
    plugin_library: Path | None,
    overwrite: bool,
    **limits: int | None,
) -> None:
    """Build engines for one target.

    ONNX is a folder of exported graphs, or holds one as ONNX/onnx.
    """
    from qe_edge.cli.inputs import find_onnx, is_manifest_folder
    from qe_edge.cli.limits import read_limits
    from qe_edge.cli.outputs import check_apart, check_disk, check_output_folder, folder_bytes
    from qe_edge.cli.plugin import print_plugin_nodes, read_plugin
    from qe_edge.export.targets import check_targets
    from qe_edge.runtime.provenance import check_deployment

    check_targets([target])
    wanted = read_limits([target], limits)
    library = read_plugin([target], plugin, plugin_library)
    source = find_onnx(onnx)
    check_deployment(onnx, source)
    check_apart(output, {"the ONNX folder": source})
    check_output_folder(output, is_manifest_folder, overwrite=overwrite)
    check_disk(output, folder_bytes(source))
    from qe_edge.cli.console import ConsoleProgress
    from qe_edge.export.build import build_engines
    from qe_edge.export.targets import has_limits
    from qe_edge.runtime.limits import with_limits
    from qe_edge.runtime.manifest import read_manifest
    from qe_edge.runtime.picture_limits import tell_limits

    manifest = with_limits(read_manifest(source), wanted)
    if has_limits(target):
        tell_limits(source, manifest, lambda line: click.echo(line, err=True))

    built = build_engines(source, output, target, plugin_library=library, limits=wanted, progress=ConsoleProgress())
    if library is not None:
        print_plugin_nodes([built])
    click.echo(f"Wrote '{built}'. Next: qe-edge run {shlex.quote(str(output))} --image FILE --prompt \"What is this?\"")
