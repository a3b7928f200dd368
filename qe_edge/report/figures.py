"""The plots of the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from qe_edge.budget.accounting import LayerBits
from qe_edge.report.drawing import (
    ENGINE,
    GROUPS,
    INK,
    LANGUAGE,
    LINE,
    MUTED,
    ORIGINAL,
    PAPER,
    QUANTIZED,
    VISUAL,
    Drawing,
)
from qe_edge.report.wording import RUNTIMES, significant
from qe_edge.validate.schema import LayerErrors, Report, RoutingLoad, Timing

WIDTH = 15.0  # inches; the page scales figures to its column
LABELLED_SHARE = 0.35  # share from which a cell is dark enough for its number
MAX_ROUTERS = 80  # rows of the routing map; more are thinned out evenly
LEAST_ERROR = 1e-7  # lower end of logarithmic axes
MAX_LABEL = 40  # characters
STEPS = {"encode": "Prepare", "visual": "Visual", "merger": "Merger", "prefill": "Prefill"}


def draw_all(report: Report) -> dict[str, Markup]:
    """Every plot that the report has data for, by name.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> list(draw_all(load_report(Path("report.json"))))  # doctest: +SKIP
    """
    plots = {"layers": layer_errors(report), "bits": bits_and_stream(report), "allocation": allocation(report)}
    if report.routing:
        plots["routing"] = routing_map(report.routing)
    if report.latency:
        plots["latency"] = latency_bars(report)
    return plots


def layer_errors(report: Report) -> Markup:
    """Relative error of every layer: calibration against held-out, vision against text tokens.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> Path("errors.svg").write_text(layer_errors(load_report(Path("report.json"))))  # doctest: +SKIP
    """
    alt = "Relative output error of every quantized layer, on a logarithmic scale; the table below has the numbers."
    with Drawing("layers", alt, (WIDTH, 4.6), columns=2) as drawing:
        first, second = drawing.axes
        first.set_title("Calibration and held-out tokens")
        second.set_title("Vision and text tokens, held-out")
        layers = report.layers
        first.set_ylabel("relative output error")
        _points(
            first,
            [layer.calibration.all if layer.calibration else None for layer in layers],
            MUTED,
            "calibration",
            hollow=True,
        )
        _points(first, [layer.heldout.all for layer in layers], QUANTIZED, "held-out")
        language = [layer for layer in layers if layer.group == "language"] or layers
        _points(second, [layer.heldout.vision for layer in language], VISUAL, "vision tokens")
        _points(second, [layer.heldout.text for layer in language], LANGUAGE, "text tokens")
        for axes, shown in ((first, layers), (second, language)):
            _error_axis(axes)
            _block_ticks(axes, shown)
            axes.legend(loc="upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)
        top = max(first.get_ylim()[1], second.get_ylim()[1]) * 2  # room for the legend
        bottom = min(first.get_ylim()[0], second.get_ylim()[0])
        for axes in drawing.axes:
            axes.set_ylim(bottom, top)
    return drawing.svg


def bits_and_stream(report: Report) -> Markup:
    """Bits against error of every layer, and the error of the hidden states along the model.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> Path("bits.svg").write_text(bits_and_stream(load_report(Path("report.json"))))  # doctest: +SKIP
    """
    alt = "Left: stored bits per weight against held-out error of every layer. Right: error of the hidden states."
    errors = {layer.name: layer.heldout.all for layer in report.layers}
    with Drawing("bits", alt, (WIDTH, 4.4), columns=2) as drawing:
        first, second = drawing.axes
        first.set_title("Bits against error, one dot a layer")
        for group, colour in GROUPS.items():
            dots = [
                (layer.bits.stored_bits, error)
                for layer in report.bits.layers
                if layer.group == group and (error := errors.get(layer.name))
            ]
            if dots:
                bits, values = zip(*dots, strict=True)
                first.scatter(bits, values, s=48, color=colour, alpha=0.75, linewidths=0, label=group)
        first.set_xlabel("stored bits per weight")
        first.set_ylabel("relative output error")
        first.legend(loc="best", handletextpad=0.2)
        first.margins(x=0.08)
        _error_axis(first)
        second.set_title("Error of the hidden states along the model")
        places = range(len(report.stream))
        second.plot(places, [block.heldout.all or 0 for block in report.stream], color=QUANTIZED, linewidth=2.5)
        for group, colour in GROUPS.items():
            own = [
                (place, block.heldout.all or 0)
                for place, block in zip(places, report.stream, strict=True)
                if block.group == group
            ]
            if own:
                own_places, values = zip(*own, strict=True)
                second.scatter(own_places, values, s=56, color=colour, zorder=3, edgecolors=PAPER, linewidths=1.5)
        second.set_ylim(bottom=0)
        second.yaxis.set_major_formatter(FuncFormatter(_as_percent))
        second.set_xlabel("block, in the order of the data")
        second.set_xticks(
            *_thin(
                [
                    (place, _block_label(block.name, block.group))
                    for place, block in zip(places, report.stream, strict=True)
                ],
                16,
            )
        )
    return drawing.svg


def allocation(report: Report) -> Markup:
    """What every layer's stored bits are spent on: codes, scales, low-rank factors, router; a mark where it routes.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> Path("allocation.svg").write_text(allocation(load_report(Path("report.json"))))  # doctest: +SKIP
    """
    layers = report.bits.layers
    parts = {
        "codes": (ORIGINAL, [layer.bits.codes / layer.bits.weights for layer in layers]),
        "scales": (MUTED, [layer.bits.scales / layer.bits.weights for layer in layers]),
        "low-rank factors": (QUANTIZED, [layer.bits.adapters / layer.bits.weights for layer in layers]),
        "router": (ENGINE, [layer.bits.router / layer.bits.weights for layer in layers]),
    }
    alt = "Stacked bars of the stored bits per weight of every layer: codes, scales, low-rank factors and router."
    with Drawing("allocation", alt, (WIDTH, 3.8)) as drawing:
        (axes,) = drawing.axes
        axes.set_title("Where the bits went, layer by layer; a dot marks a layer with routed experts")
        floor = np.zeros(len(layers))
        for label, (colour, heights) in parts.items():
            if any(heights):
                axes.bar(range(len(layers)), heights, 0.8, bottom=floor, color=colour, linewidth=0, label=label)
                floor = floor + heights
        routed = [place for place, layer in enumerate(layers) if layer.bits.router]
        axes.scatter(routed, floor[routed] + 0.15, s=14, color=INK, linewidths=0)
        axes.axhline(report.bits.total.stored_bits, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_ylabel("stored bits per weight")
        _block_ticks(axes, layers)
        axes.set_ylim(0, float(floor.max(initial=1.0)) * 1.25)
        axes.legend(loc="upper left", ncols=4, handlelength=1, columnspacing=1.4)
    return drawing.svg


def routing_map(routing: Sequence[RoutingLoad]) -> Markup:
    """Share of tokens of every expert: one row a router, vision tokens on the left, text tokens on the right.

    Example:
        >>> layers = ["model.language_model.layers.0.mlp.up_proj"]
        >>> load = RoutingLoad(layers=layers, group="language", all=[0.25, 0.75], vision=[0.1, 0.9], text=[0.5, 0.5])
        >>> drawn = routing_map([load])
        >>> drawn.startswith("<svg"), "90 %" in drawn
        (True, True)
    """
    step = -(-len(routing) // MAX_ROUTERS)
    rows = routing[::step]
    alt = "Heat map of the share of tokens that every routed expert serves, for every router, vision and text apart."
    with Drawing("routing", alt, (WIDTH, 1.2 + 0.27 * len(rows)), columns=2) as drawing:
        for axes, kind, colour in zip(drawing.axes, ("vision", "text"), (VISUAL, LANGUAGE), strict=True):
            axes.set_title(f"{kind.capitalize()} tokens")
            axes.grid(visible=False)
            axes.spines["bottom"].set_visible(False)
            experts = max(len(row.all) for row in rows)
            for place, row in enumerate(rows):
                shares: list[float] | None = getattr(row, kind)
                for expert, share in enumerate(shares or []):
                    # the root spreads the small shares, where most experts are
                    axes.barh(
                        place, 0.94, 0.86, left=expert - 0.47, color=colour, alpha=max(share, 0.002) ** 0.5, linewidth=0
                    )
                    if share >= LABELLED_SHARE:
                        axes.text(
                            expert, place, f"{100 * share:.0f} %", ha="center", va="center", color=PAPER, fontsize=9
                        )
            absent = [place for place, row in enumerate(rows) if not getattr(row, kind)]
            if absent:
                centre = sum(absent) / len(absent)
                axes.text(experts / 2 - 0.5, centre, f"no {kind} tokens here", ha="center", va="center", color=MUTED)
            axes.set_xlim(-0.5, experts - 0.5)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.set_xticks(range(experts), [f"E{expert + 1}" for expert in range(experts)])
            axes.xaxis.tick_top()
            axes.set_yticks(
                range(len(rows)), [_router_label(row) for row in rows] if kind == "vision" else [""] * len(rows)
            )
    return drawing.svg


def latency_bars(report: Report) -> Markup:
    """Time to first token by step, and time per decoded token, with quartiles.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> Path("latency.svg").write_text(latency_bars(load_report(Path("report.json"))))  # doctest: +SKIP
    """
    alt = "Bars of the time to the first token and of the time per decoded token; the table below has the numbers."
    rows = report.latency
    with Drawing("latency", alt, (WIDTH, 1.3 + 0.62 * len(rows)), columns=2, widths=[1.6, 1]) as drawing:
        first, second = drawing.axes
        first.set_title("Time to first token, ms")
        second.set_title("Per decoded token, ms")
        for place, row in enumerate(rows):
            colour = ORIGINAL if row.runtime == "pytorch" else ENGINE
            start = 0.0
            for number, step in enumerate([step for step in STEPS if step in row.steps] or ["first_token"]):
                width = row.steps[step].median
                first.barh(place, width, 0.5, left=start, color=colour, alpha=1 - 0.24 * (number % 4), edgecolor=PAPER)
                start += width
            _measured(first, place, row.steps["first_token"], start)
            second.barh(place, row.steps["decode"].median, 0.5, color=colour)
            _measured(second, place, row.steps["decode"], 0)
        for number, name in enumerate(STEPS.values()):
            first.barh(-1, 0, color=ENGINE, alpha=1 - 0.24 * number, label=name)
        first.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=4, handlelength=1, columnspacing=1.4)
        names = [_runtime_label(row.runtime, row.setting) for row in rows]
        for axes, labels in ((first, names), (second, [""] * len(rows))):
            axes.set_yticks(range(len(rows)), labels)
            axes.set_ylim(len(rows) - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x", color=LINE)
            axes.margins(x=0.16)
            axes.set_xlim(left=0)
    return drawing.svg


def _points(axes: Axes, values: Sequence[float | None], colour: str, label: str, *, hollow: bool = False) -> None:
    known = [(place, value) for place, value in enumerate(values) if value]
    if not known:
        return
    places, shown = zip(*known, strict=True)
    if hollow:
        axes.scatter(places, shown, s=52, facecolors="none", edgecolors=colour, linewidths=1.6, label=label)
    else:
        axes.scatter(places, shown, s=30, color=colour, linewidths=0, label=label, zorder=3)


def _error_axis(axes: Axes) -> None:
    """Logarithmic, labelled in percent."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(max(low / 1.3, LEAST_ERROR), max(high * 1.3, LEAST_ERROR * 10))
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_as_percent))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _as_percent(value: float, _place: object) -> str:
    return f"{100 * value:.3g} %"


def _block_ticks(axes: Axes, layers: Sequence[LayerErrors | LayerBits]) -> None:
    """A tick in the middle of every block, and a thin line between groups."""
    blocks: dict[str, list[int]] = {}
    for place, layer in enumerate(layers):
        blocks.setdefault(_block_label(layer.name, layer.group), []).append(place)
        if place and layers[place - 1].group != layer.group:
            axes.axvline(place - 0.5, color=LINE, linewidth=1.2)
    ticks = [(sum(places) / len(places), label) for label, places in blocks.items()]
    axes.set_xticks(*_thin(ticks, 12))
    axes.set_xlim(-0.8, len(layers) - 0.2)


def _thin(ticks: Sequence[tuple[float, str]], most: int) -> tuple[list[float], list[str]]:
    """Positions and labels, so few that they do not touch."""
    step = max(1, -(-len(ticks) // most))
    kept = ticks[::step]
    return [place for place, _ in kept], [label for _, label in kept]


def _block_label(name: str, group: str) -> str:
    """Short name of a block: V2 for the third vision block, L11 for a decoder layer, merger."""
    number = next((part for part in name.split(".") if part.isdigit()), "")
    prefix = {"visual": "V", "language": "L"}.get(group)
    return f"{prefix}{number}" if prefix and number else _short(group)


def _router_label(row: RoutingLoad) -> str:
    parts = [name.rpartition(".")[2].removesuffix("_proj") for name in row.layers]
    return _short(f"{_block_label(row.layers[0], row.group)}  {'/'.join(parts)}")


def _runtime_label(runtime: str, setting: str) -> str:
    names = {**RUNTIMES, "pytorch": "PyTorch original"}
    return _short(f"{names.get(runtime, runtime)}, {setting}")


def _short(label: str) -> str:
    """A label that leaves room for the plot."""
    return label if len(label) <= MAX_LABEL else f"{label[: MAX_LABEL - 1]}\u2026"


def _measured(axes: Axes, place: float, timing: Timing, end: float) -> None:
    """A line over the quartiles, and the median beside the bar."""
    axes.plot([timing.lower, timing.upper], [place, place], color=INK, linewidth=1.4, solid_capstyle="butt")
    at = max(end, timing.median, timing.upper)
    axes.annotate(significant(timing.median), (at, place), (6, 0), textcoords="offset points", va="center")
