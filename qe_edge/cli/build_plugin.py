"""`qe-edge build-plugin`: the libraries of the kernels, compiled from the sources in this package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qe_edge.cli.options import Command
from qe_edge.cli.outputs import check_output_path, check_writable
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.export import plugin_build
else:
    plugin_build = lazy_module("qe_edge.export.plugin_build")


@click.command(
    "build-plugin", cls=Command, example="qe-edge build-plugin\nqe-edge build-plugin --arch aarch64 -o jetson"
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder; by default where 'build' finds it.")
@click.option("--arch", metavar="NAME", help="x86_64 or aarch64, which is cross-built; this machine's by default.")
@click.option(
    "--tensorrt-include", type=click.Path(path_type=Path), metavar="DIR", help="TensorRT's headers, if not found."
)
def command(output: Path | None, arch: str | None, tensorrt_include: Path | None) -> None:
    """Compile the TensorRT plugin, and the same kernels as an operator of ONNX Runtime.

    Needs CMake, a C++ compiler, CUDA's nvcc and TensorRT's headers, but no GPU. The kernels have run on an H100;
    the libraries themselves have not yet run on hardware.
    """
    if output is not None:
        check_output_path(output)
    tools = plugin_build.find_toolchain(arch, tensorrt_include)
    if output is not None:
        check_writable(output / "inside")
    click.echo(f"nvcc {tools.nvcc}, headers {tools.headers}. This takes about a minute.", err=True)
    if tools.ptxas12 is None:
        click.echo(
            "Without an assembler of CUDA 12 the library runs under CUDA 13 drivers only, not under JetPack 6. "
            f"For both: pip install {plugin_build.CUDA12_FROM_PYPI}",
            err=True,
        )
    library = plugin_build.build_plugin(tools, output)
    click.echo(f"Wrote '{library}'. Next: qe-edge build ONNX -o ENGINES --target rtx --plugin")
