"""What `--plugin` and `--plugin-library` mean to the commands that build engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qe_edge.export.plugin_check import check_plugin_given, choose_plugin
from qe_edge.runtime.engine_info import read_engine_info


def read_plugin(targets: Sequence[str], plugin: bool, library: Path | None) -> Path | None:
    """The library to build with, checked before any work; None if the user wants no plugin.

    Raises:
        InputError: If no target takes the plugin, or one cannot do without it and the user wants none.
        TargetError: If there is no library, or it does not serve.
    """
    if not plugin and library is None:
        check_plugin_given(targets)
        return None
    return choose_plugin(targets, library)


def print_plugin_nodes(folders: Sequence[Path]) -> None:
    """How many nodes of every graph the plugin runs, and how many of them the engine's layer list shows."""
    for folder in folders:
        info = read_engine_info(folder)
        if info is None or info.plugin is None:
            continue
        for name, graph in info.graphs.items():
            nodes, listed = len(graph.plugin_nodes), len(graph.plugin_layers)
            place = f"{info.target}, {name}" if len(folders) > 1 else name
            click.echo(f"{place}: {nodes} plugin nodes, {listed} of them in the engine's layer list")
    click.echo("Engines with the plugin have not yet run on hardware.")
