"""Describe what a conversion carried over, folded and lost, for the user and in the folder's README."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from qe_edge.formats.base import Conversion, Format
from qe_edge.formats.carried import CarriedLayer
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid, rounds_activations
from qe_edge.system.version import VERSION

README = "README.md"


def summarize(conversion: Conversion, form: Format) -> list[str]:
    r"""Return sentences on what was carried over and what was lost.

    Args:
        conversion: The checkpoint.
        form: The format.

    Example:
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> form = FORMATS["gptq"]()  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     print("\n".join(summarize(plan_conversion(source, form), form)))
    """
    return [*_carried(conversion, form.adapter), *_lost(conversion), *form.notes(conversion)]


def write_readme(conversion: Conversion, form: Format, folder: Path, name: str, lines: list[str]) -> None:
    """Write README.md: the folder's origin, its content, and how to load it.

    Args:
        conversion: The checkpoint.
        form: The format.
        folder: The folder to write into.
        name: Its later name.
        lines: The lines of `summarize`.

    Example:
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> form = FORMATS["gptq"]()  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     write_readme(plan_conversion(source, form), form, Path(), "for-vllm", ["Everything was carried."])
    """
    parts = [
        f"# {name}",
        f"QE-Edge {VERSION} converted this folder from a quantized checkpoint; `files.json` holds the SHA-256 of the "
        f"checkpoint's files and of these. It is for {form.reader}.",
        "\n".join(f"- {line}" for line in lines),
        f"```\n{form.how_to_load(conversion, name)}\n```",
    ]
    (folder / README).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _carried(conversion: Conversion, adapter: str) -> Iterator[str]:
    kinds = Counter(_kind(layer) for layer in conversion.coded.values())
    total, dtype = len(conversion.layers), str(conversion.dtype).removeprefix("torch.")
    for kind, number in kinds.most_common():
        yield f"{number} of {total} layers: {kind}; every code as it was."
    if conversion.decoded:
        yield f"{len(conversion.decoded)} of {total} layers: decoded to ordinary {dtype} weights."
    if not conversion.coded:
        yield "No layer has codes left: this is an ordinary model."
    folding = conversion.folding
    if folding.dropped:
        dropped = sum(int(mask.sum()) for mask in folding.dropped.values())
        yield f"{dropped} input channels that the codes leave to the correction have the code of zero."
    if folding.norms or folding.rows:
        places = [f"{len(folding.norms)} norms"] if folding.norms else []
        places += [f"the rows of {len(folding.rows)} layers"] if folding.rows else []
        yield f"Channel scales are folded into {' and '.join(places)}, which are float32 now."
    if folding.mixing is not None:
        yield f"The matrix of the rotation is folded into the head, which is one of its own now, in {dtype}."
    ranks = sorted({layer.rank for layer in conversion.corrected.values()})
    if ranks:
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        yield (
            f"The correction of {len(conversion.corrected)} layers, of rank {span}, is the LoRA in '{adapter}', in "
            "float32."
        )


def _kind(layer: CarriedLayer) -> str:
    """The grid of the checkpoint, and the one that it is written on where that is another."""
    own = _in_words(layer.own_grid)
    return own if layer.grid == layer.own_grid else f"{own}, written as {_in_words(layer.grid)}"


def _in_words(grid: WeightGrid) -> str:
    scale = "one scale per channel" if grid.group_size == PER_CHANNEL else f"groups of {grid.group_size}"
    return f"{grid.bits} bits in {scale} {'without' if grid.symmetric else 'with'} zero points"


def _lost(conversion: Conversion) -> Iterator[str]:
    rounded = {layer.geometry.activation_bits for layer in conversion.layers.values()}
    if any(rounds_activations(bits) for bits in rounded):
        yield f"Lost: activations are no longer rounded to {max(rounded)} bits, so answers may differ."
