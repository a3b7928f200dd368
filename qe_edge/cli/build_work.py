"""The work of `qe-edge build`."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import click

from qe_edge.cli.console import ConsoleProgress
from qe_edge.cli.inputs import find_onnx, is_manifest_folder
from qe_edge.cli.limits import read_limits
from qe_edge.cli.outputs import check_apart, check_disk, check_output_folder, folder_bytes, human_bytes
from qe_edge.cli.plugin import print_plugin_nodes, read_plugin
from qe_edge.export.build import build_engines
from qe_edge.export.targets import CUDA, check_targets, get_target, has_limits
from qe_edge.runtime.cache_tensors import is_state, sizes_of
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.limits import with_limits
from qe_edge.runtime.manifest import ActionManifest, EncoderManifest, Manifest, read_any_manifest
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
    if get_target(target).backend == CUDA:
        click.echo(_gpu_memory(built), err=True)
    where = shlex.quote(str(output))
    run_it = f'qe-edge run {where} --image FILE --prompt "What is this?"'
    open_it = f"qe_edge.runtime.encoder.EncoderEngine.load({str(output)!r}) in Python"
    if isinstance(manifest, ActionManifest):
        run_it += " --state NUMBERS"
    click.echo(f"Wrote '{built}'. Next: {open_it if isinstance(manifest, EncoderManifest) else run_it}")


def _gpu_memory(folder: Path) -> str:
    """Memory that ONNX Runtime will take on a GPU, for engines that have no limits of size."""
    info, manifest = read_engine_info(folder), read_any_manifest(folder)
    weights = sum(graph.size for graph in info.graphs.values()) if info else 0
    line = f"On the GPU the weights take {human_bytes(weights)}"
    if not isinstance(manifest, Manifest):
        return f"{line}."
    token = 2 * sum(math.prod(sizes_of(spec, 1, 1)) for spec in manifest.cache if not is_state(spec.name))  # float16
    token *= 1 if manifest.kv.in_place else 2
    states = 2 * 4 * sum(math.prod(sizes_of(spec, 1, 1)) for spec in manifest.cache if is_state(spec.name))  # float32
    kept = f" and the states of its layers {human_bytes(states)}" if states else ""
    return f"{line}, and a KV cache {human_bytes(1000 * token)} for 1000 tokens{kept}."
