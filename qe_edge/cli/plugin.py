"""What `--plugin` and `--plugin-library` mean to the commands that build engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qe_edge.cli.plan import Plan
    from qe_edge.export.plugin_check import LayerForm
    from qe_edge.recipe import Recipe


def read_plugin(targets: Sequence[str], plugin: bool, library: Path | None) -> Path | None:
    """The library to build with, checked before any work; None if the user wants no plugin.

    Raises:
        InputError: If no target takes the plugin.
        TargetError: If there is no library, or it does not serve.
    """
    if not plugin and library is None:
        return None
    from qe_edge.export.plugin_check import choose_plugin

    return choose_plugin(targets, library)


def check_planned_layers(targets: Sequence[str], library: Path, plan: Plan, recipe: Recipe) -> None:
    """Refuse a plan with layers that the plugin cannot run.

    Raises:
        TargetError: Naming the first one.
    """
    from qe_edge.export.plugin_check import check_forms
    from qe_edge.export.targets import get_target

    check_forms([get_target(name) for name in targets], library, planned_forms(plan, recipe))


def planned_forms(plan: Plan, recipe: Recipe) -> list[LayerForm]:
    """The layers of a plan as the plugin would get them.

    A budget chooses among several grids of a weight, and ranks that the plugin takes. Layers that read the same input
    may be joined to one, so what only one of them breaks is left to the build.
    """
    from qe_edge.export.plugin_check import LayerForm
    from qe_edge.grids import PER_CHANNEL

    scheme = recipe.get_scheme()
    grids = scheme.budget_grids() if recipe.budget else [scheme.weight]
    forms = []
    for layer in plan.layers:
        routed = layer.adapter.experts > 1
        for grid in grids:
            group = grid.resolve_group(layer.in_features)
            forms.append(
                LayerForm(
                    layer.name,
                    layer.in_features,
                    layer.joint_outputs,
                    act_bits=scheme.activation_bits,
                    group_size=PER_CHANNEL if group == layer.in_features else group,
                    rank_shared=layer.adapter.rank_shared,
                    rank_routed=layer.adapter.rank_routed if routed else 0,
                    num_experts=layer.adapter.experts if routed else 0,
                )
            )
    return forms


def print_plugin_nodes(folders: Sequence[Path]) -> None:
    """How many nodes of every graph the plugin runs, and how many of them the engine's layer list shows."""
    from qe_edge.runtime.engine_info import read_engine_info

    for folder in folders:
        info = read_engine_info(folder)
        if info is None or info.plugin is None:
            continue
        for name, graph in info.graphs.items():
            nodes, listed = len(graph.plugin_nodes), len(graph.plugin_layers)
            place = f"{info.target}, {name}" if len(folders) > 1 else name
            click.echo(f"{place}: {nodes} plugin nodes, {listed} of them in the engine's layer list")
    click.echo("Engines with the plugin have not yet run on hardware.")
