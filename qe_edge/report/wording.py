"""Numbers and sentences of the report: the format of values, the headline, and the limits of the measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qe_edge.budget.accounting import FileSize
from qe_edge.validate.schema import Accuracy, Contender, Latency, Report, Role, TargetState

ROLES: dict[Role, str] = {"original": "Original", "quantized": "Quantized", "engine": "Engine"}
RUNTIMES = {
    "onnxruntime": "ONNX Runtime",
    "onnxruntime_cuda": "ONNX Runtime, CUDA",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "pytorch": "PyTorch, original",
}
KINDS = {"open": "Open", "yesno": "Yes/no", "": "Other"}
SUPERSCRIPT = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
NONE = "\u2013"


@dataclass(frozen=True)
class Card:
    """One figure of the headline.

    Attributes:
        label: Its name.
        value: The figure.
        note: A figure to compare it with, or its unit.
    """

    label: str
    value: str
    note: str


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share as percent.

    Example:
        >>> percent(0.754), percent(0.754, digits=0)
        ('75.4 %', '75 %')
    """
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """Format a difference of two shares in percentage points, with a true minus sign.

    Example:
        >>> points(0.764 - 0.752), points(0.0)
        ('+1.2 points', '±0.0 points')
    """
    rounded = round(100 * value, 1)
    sign = "+" if rounded > 0 else "\u2212" if rounded < 0 else "\u00b1"
    return f"{sign}{abs(rounded):.1f} points"


def plain_significant(value: float, digits: int = 2) -> str:
    """A number for a terminal; small ones with an exponent, so that none is shown as zero.

    Example:
        >>> plain_significant(4.1e-06), plain_significant(0.0123), plain_significant(0.0)
        ('4.1e-06', '0.012', '0')
    """
    return "0" if value == 0 else f"{value:.{digits}g}"


def significant(value: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits; a small one as a power of ten.

    Example:
        >>> significant(3.14159), significant(0.00123456), significant(123456, digits=2)
        ('3.14', '0.00123', '123456')
    """
    if value is None:
        return NONE
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    exponent = int(power)
    if exponent < -4:
        return f"{mantissa} \u00d7 10{str(exponent).translate(SUPERSCRIPT)}"
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def size(value: float | None) -> str:
    """Format bytes in decimal units.

    Example:
        >>> size(512), size(5_300_000), size(12e9)
        ('512 B', '5.30 MB', '12.0 GB')
    """
    if value is None:
        return NONE
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.0f} B" if unit == "B" else f"{significant(value)} {unit}"
        value /= 1000
    return f"{significant(value)} GB"


def milliseconds(value: float | None) -> str:
    """Format a time.

    Example:
        >>> milliseconds(12.345)
        '12.3 ms'
    """
    return NONE if value is None else f"{significant(value)} ms"


def accuracy_of(accuracy: Accuracy | None, kind: str | None = None) -> str:
    """Format the accuracy on one kind of question, or on all.

    Example:
        >>> accuracy = Accuracy(correct={"open": 8, "yesno": 9}, total={"open": 10, "yesno": 10})
        >>> accuracy_of(accuracy), accuracy_of(accuracy, "open")
        ('85.0 %', '80.0 %')
    """
    return NONE if accuracy is None else percent(accuracy.share(kind))


def tally(accuracy: Accuracy, kind: str | None = None) -> str:
    """Format right answers and questions, for example "164 of 200".

    Example:
        >>> accuracy = Accuracy(correct={"open": 8, "yesno": 9}, total={"open": 10, "yesno": 10})
        >>> tally(accuracy), tally(accuracy, "open")
        ('17 of 20', '8 of 10')
    """
    kinds = list(accuracy.total) if kind is None else [kind]
    return f"{sum(accuracy.correct.get(k, 0) for k in kinds)} of {sum(accuracy.total.get(k, 0) for k in kinds)}"


def kind_names(report: Report) -> list[str]:
    """Kinds of question that occur, open ones first.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> kind_names(load_report(Path("out/demo/report.json")))  # doctest: +SKIP
    """
    known = [kind for kind in KINDS if kind in report.evaluation.kinds]
    return known + sorted(kind for kind in report.evaluation.kinds if kind not in KINDS)


def by_stage(files: list[FileSize]) -> dict[str, list[FileSize]]:
    """Group files by their stage; stages keep the order of the pipeline.

    Example:
        >>> sizes = [FileSize(stage="original", name="a.safetensors", size=9), FileSize(stage="onnx", name="b", size=3)]
        >>> {stage: [file.name for file in files] for stage, files in by_stage(sizes).items()}
        {'original': ['a.safetensors'], 'onnx': ['b']}
    """
    return {stage: [file for file in files if file.stage == stage] for stage in dict.fromkeys(f.stage for f in files)}


def listing(names: list[str]) -> str:
    """Join names to a list in words: a, b and c.

    Example:
        >>> listing(["a", "b", "c"]), listing(["a"])
        ('a, b and c', 'a')
    """
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def as_json(value: Any) -> str:  # noqa: ANN401 - any JSON value
    """Indented JSON.

    Example:
        >>> print(as_json({"method": "qe"}))
        {
          "method": "qe"
        }
    """
    return json.dumps(value, indent=2, ensure_ascii=False)


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "significant": significant,
    "size": size,
    "ms": milliseconds,
    "accuracy_of": accuracy_of,
    "tally": tally,
    "as_json": as_json,
    "listing": listing,
}


def headline(report: Report) -> list[Card]:
    """The figures at the top of the page.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> for card in headline(load_report(Path("out/demo/report.json"))):  # doctest: +SKIP
        ...     print(card.label, card.value)
    """
    rows = {row.role: row for row in report.contenders}
    original, quantized = rows["original"], rows["quantized"]
    best = rows.get("engine", quantized)
    change = (best.accuracy.share() or 0) - (original.accuracy.share() or 0)
    bits = report.bits
    cards = [
        Card(
            "Accuracy",
            percent(best.accuracy.share()),
            f"original {percent(original.accuracy.share())}, {points(change)}",
        ),
        Card("KL to the original", _kl(best), "nats per answer token"),
        Card(
            "Bits per weight",
            significant(bits.total.stored_bits),
            f"all included; {significant(bits.total.read_bits)} read per token",
        ),
        Card("Weights", size(bits.model_bytes), f"original {size(_original_bytes(report))}, whole model"),
    ]
    fastest = fastest_engine(report)
    if fastest is not None:
        cards.append(
            Card(
                "First token",
                milliseconds(fastest.steps["first_token"].median),
                f"then {milliseconds(fastest.steps['decode'].median)} a token, {fastest.setting}",
            )
        )
    return cards


def fastest_engine(report: Report) -> Latency | None:
    """The engine row with the shortest time to the first token.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> fastest_engine(load_report(Path("out/demo/report.json"))).setting  # doctest: +SKIP
    """
    rows = [row for row in report.latency if row.runtime != "pytorch"]
    return min(rows, key=lambda row: row.steps["first_token"].median, default=None)


def limits(report: Report) -> list[str]:
    r"""Return the limits of a report's numbers, one sentence each.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.report.page import load_report  # doctest: +SKIP
        >>> print("\n".join(limits(load_report(Path("out/demo/report.json")))))  # doctest: +SKIP
    """
    samples = report.evaluation.samples
    found = [
        f"Accuracy on {samples} questions is known to about \u00b1{100 * _sampling_error(report):.0f} points "
        "(95 % interval); smaller differences between rows mean little. KL and agreement are sharper.",
        "An answer counts as right only if it equals the reference but for case and a final full stop.",
    ]
    found += list(report.notes)
    if report.bits.total.codes < 4 * report.bits.total.weights:
        found.append(
            "ONNX has no 3-bit integers: exported files, and engines without the TensorRT plugin, hold codes of fewer "
            "than 4 bits as INT4. Stored bits are those of the checkpoint and of the plugin."
        )
    if report.routing:
        found.append(
            "Read bits assume a kernel that reads one routed expert per token. The portable ONNX graph evaluates all "
            "experts and masks them."
        )
    if report.latency:
        row = report.latency[0]
        found.append(_how_speed_was_measured(report, row))
        found += _how_energy_was_measured(report.latency)
    else:
        found.append("No engine was run, so this page says nothing about speed.")
    found += [_state(target) for target in report.targets if target.plugin_nodes or not target.validated]
    if report.model == "demo":
        found.append(
            "The demo model is small and insensitive to quantization: it shows that every stage works, not which "
            "method is better."
        )
    return found


def _how_speed_was_measured(report: Report, row: Latency) -> str:
    where = report.machine.processor
    if row.runtime == "onnxruntime":
        levels = (
            "Accuracy level 4 of ONNX Runtime rounds activations once more; accuracy and KL on this page are for "
            "level 0. "
        )
    else:
        where, levels = f"the GPU of this machine ({where})", ""
    return (
        f"Speed was measured on {where} with {row.threads} thread{'s' if row.threads != 1 else ''}, one question of "
        f"{row.prompt_tokens} tokens at a time. {levels}Peak memory counts the whole process; Python and its libraries "
        "are nearly all of it for a small model."
    )


def _how_energy_was_measured(rows: Sequence[Latency]) -> list[str]:
    """Sentences on the power rails; none for a machine without."""
    energies = [row.measured_energy for row in rows if row.measured_energy is not None]
    said = []
    if energies:
        said.append(
            f"Energy is that of the power rails {', '.join(energies[0].rails)} while answers were made. Energy above "
            "idle leaves out the power before the model was loaded. These readings were never checked on a Jetson."
        )
    said += [notice for energy in energies for notice in energy.notices]
    said += [f"Energy was not measured. {row.energy_problem}" for row in rows if row.energy_problem]
    return list(dict.fromkeys(said))


def _state(target: TargetState) -> str:
    """Return a sentence on a target: built or run, with or without the plugin."""
    plugin = f" with {target.plugin_nodes} nodes of the TensorRT plugin" if target.plugin_nodes else ""
    if target.validated:
        return f"The engine for '{target.name}' was built{plugin}."
    return f"The engine for '{target.name}' was built{plugin}, and has not yet been run on hardware."


def _kl(row: Contender) -> str:
    return significant(row.answer_tokens.kl if row.answer_tokens else None, 2)


def _original_bytes(report: Report) -> int | None:
    weights = [file.size for file in report.sizes if file.stage == "original" and file.name.endswith(".safetensors")]
    return sum(weights) or None


def _sampling_error(report: Report) -> float:
    """Half the 95 % interval of the original's accuracy. Wilson's centre keeps it above zero at 0 and 1."""
    count = report.evaluation.samples
    share = report.contenders[0].accuracy.share() or 0.0
    centre = (share * count + 2) / (count + 4)
    return 1.96 * math.sqrt(centre * (1 - centre) / (count + 4))
