"""The work of `qe-edge build`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import find_onnx, is_manifest_folder
from qe_edge.cli.limits import read_limits
from qe_edge.cli.outputs import check_apart, check_disk, check_output_folder, folder_bytes
from qe_edge.cli.plugin import print_plugin_nodes, read_plugin
from qe_edge.export.build import build_engines
from qe_edge.export.targets import check_targets, has_limits
from qe_edge.runtime.limits import with_limits
from qe_edge.runtime.manifest import Manifest, read_any_manifest
from qe_edge.runtime.picture_limits import tell_limits
from qe_edge.runtime.provenance import check_deployment


def run(
    *,
    onnx: Path,
    output: Path,
    target: str,
    plugin: bool,
    plugin_library: Path | None,
    overwrite: bool,
    **limits: int | None,
) -> None:
    """Check, build and say what comes next; arguments as the command's."""
    check_targets([target])
    wanted = read_limits([target], limits)
    library = read_plugin([target], plugin, plugin_library)
    source = find_onnx(onnx)
    check_deployment(onnx, source)
    check_apart(output, {"the ONNX folder": source})
    check_output_folder(output, is_manifest_folder, overwrite=overwrite)
    check_disk(output, folder_bytes(source))
    manifest = read_any_manifest(source)
    if isinstance(manifest, Manifest):
        manifest = with_limits(manifest, wanted)
    if isinstance(manifest, Manifest) and has_limits(target):
        tell_limits(source, manifest, lambda line: click.echo(line, err=True))

    built = build_engines(source, output, target, plugin_library=library, limits=wanted, progress=ConsoleProgress())
    if library is not None:
        print_plugin_nodes([built])
    where = shlex.quote(str(output))
    run_it = f'qe-edge run {where} --image FILE --prompt "What is this?"'
    open_it = f"qe_edge.runtime.encoder.EncoderEngine.load({str(output)!r}) in Python"
    click.echo(f"Wrote '{built}'. Next: {run_it if isinstance(manifest, Manifest) else open_it}")
