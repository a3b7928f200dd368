"""How a dry run looks."""

from __future__ import annotations

import click
import yaml

from qe_edge.budget.model import AdapterSize
from qe_edge.cli.outputs import human_bytes
from qe_edge.cli.tables import print_table
from qe_edge.quantization.plan import Plan, collapse
from qe_edge.recipes.recipe import Recipe


def print_plan(recipe: Recipe, plan: Plan, samples: int) -> None:
    """Print the resolved recipe (as YAML that `--recipe` takes), the layers, and what the run needs."""
    values = recipe.resolved().model_dump(mode="json", exclude_none=True)
    click.echo("# Resolved recipe; save these lines to a file to use them with --recipe")
    click.echo(yaml.safe_dump(values, sort_keys=False))
    rows = [
        (
            name,
            f"{count} x",
            f"{layer.out_features} x {layer.in_features}",
            _experts(layer.adapter),
            f"{layer.bits.stored_bits:.2f}",
            f"{layer.bits.read_bits:.2f}",
        )
        for name, layer, count in collapse(plan.layers)
    ]
    total = plan.total
    rows.append((
        "all", f"{len(plan.layers)} x", f"{total.weights:,} weights", "", f"{total.stored_bits:.2f}",
        f"{total.read_bits:.2f}",
    ))  # fmt: skip
    print_table(("Layer", "", "Out x in", "Shared + routed ranks", "Stored bits", "Read bits"), rows)
    if any(layer.adapter.experts > 1 for layer in plan.layers):
        click.echo("Bits are upper bounds: a layer whose calibration data need fewer experts gets fewer.")
    if recipe.budget:
        limits = {"stored": recipe.budget.bits, "read": recipe.budget.read_bits}
        wanted = " and ".join(f"{bits:g} {kind} bits" for kind, bits in limits.items() if bits is not None)
        click.echo(f"Budget:      {wanted} per weight; chosen after measuring, the bits above are the least")
    asked = recipe.calibration.samples
    fewer = f", all there are; {asked} were wanted" if samples < asked else ""
    click.echo(f"Calibration: {samples} samples of '{recipe.calibration.source}'{fewer}")
    click.echo(f"Memory:      about {human_bytes(plan.memory_bytes)}")
    click.echo(
        f"Disk:        about {human_bytes(plan.checkpoint_bytes)} for the checkpoint, "
        f"{human_bytes(plan.disk_bytes)} while quantizing"
    )


def print_time(text: str) -> None:
    """Print how long the run takes."""
    click.echo(f"Time:        {text}")


def _experts(size: AdapterSize) -> str:
    if size.experts > 1:
        return f"{size.rank_shared} + {size.experts} x {size.rank_routed}"
    return str(size.rank_shared) if size.rank_shared else "none"
