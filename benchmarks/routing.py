r"""When does routing pay? Routed experts against static corrections of the same read and of the same stored bytes.

    python benchmarks/assemble_real_vlm.py out/vlm
    python benchmarks/routing.py out/vlm [--blocks 3 14 26] [--scheme w4a8] [--refine all]

Relative output error of single layers on tokens of other samples than those they were calibrated on, image tokens and
text tokens apart, with codes rounded to nearest and by GPTQ:

| column | correction |
| --- | --- |
| none | none |
| rank | static, of the rank that one token uses of the experts, as the paper compares |
| read | static, of the rank that reads as many bytes as one token of the experts, router included |
| stored | static, of the rank that holds as many bytes as all experts and their router |
| experts | Quant Experts, tokens first grouped by co-occurrence of important channels |
| modality | the same, tokens first grouped by what they are |
| refined | "experts" after gradient refinement, with --refine |
| random | "experts" with a random expert (its expectation) |
| oracle | "experts" with every token's best expert |

Siblings (q/k/v, gate/up) are stacked, as in the product. Layers too small for experts by our rule are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qe_edge.budget.accounting import add_counts, layer_counts
from qe_edge.calibration.sensitivity import IMAGE, token_kinds
from qe_edge.calibration.sources import load_samples
from qe_edge.calibration.statistics import InputStatistics, StatisticsCollector
from qe_edge.layers.linear import QELinear
from qe_edge.methods.qe import QuantExperts
from qe_edge.methods.qe_options import QuantExpertsOptions, shrink_to_layer
from qe_edge.models.family import Encoded
from qe_edge.models.groups import LinearGroup, linear_groups
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.numerics.schemes import SCHEMES, get_scheme
from qe_edge.quantization.job import BATCH
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.errors import ModelError, QEError
from qe_edge.validate.subjects import in_float32

ROUNDINGS: dict[str, dict[str, Any]] = {
    "nearest": {"rounding": "nearest", "clip": False},
    "gptq": {"rounding": "gptq", "clip": True},
}
COLUMNS = ("none", "rank", "read", "stored", "experts", "modality", "refined", "random", "oracle")


@dataclass(frozen=True)
class Layer:
    """A linear problem with its calibration statistics and held-out inputs.

    Attributes:
        name: Without the common prefix.
        weight: `[out, in]` float32, siblings stacked.
        statistics: Of the calibration input.
        tokens: `[n, in]` float32 held-out inputs.
        image: `[n]` bool, which of them are image tokens.
    """

    name: str
    weight: Tensor
    statistics: InputStatistics
    tokens: Tensor
    image: Tensor


@dataclass(frozen=True)
class Row:
    """Errors of one correction of one layer.

    Attributes:
        layer: Name of the layer.
        rounding: How the codes were chosen.
        column: Which correction.
        image: Relative output error on held-out image tokens.
        text: The same on text tokens.
        stored: Bits per weight in a checkpoint.
        read: Bits per weight that one token reads.
    """

    layer: str
    rounding: str
    column: str
    image: float
    text: float
    stored: float
    read: float


def encoded_batches(loaded: LoadedModel, source: Path, count: int) -> list[Encoded]:
    """Samples of a source with their answers, in batches."""
    samples = load_samples(str(source), count)
    starts = range(0, len(samples), BATCH)
    return [loaded.family.encode(loaded.processor, samples[one : one + BATCH], answers=True) for one in starts]


def feed_inputs(
    loaded: LoadedModel,
    batches: Sequence[Encoded],
    groups: Sequence[LinearGroup],
    take: Callable[[int, Tensor, Tensor], None],
) -> None:
    """Run batches and hand over every group's valid input tokens `[n, in]` and their kinds `[n]`."""
    for encoded in batches:
        valid = torch.from_numpy(encoded.attention_mask).bool()
        kinds = torch.from_numpy(token_kinds(encoded))[valid]

        def hook(number: int, valid: Tensor = valid, kinds: Tensor = kinds) -> Callable[..., None]:
            def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                take(number, inputs[0][valid], kinds)

            return note

        handles = [group.linears[0].register_forward_pre_hook(hook(i)) for i, group in enumerate(groups)]
        try:
            with torch.no_grad():
                loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()


def load_layers(options: argparse.Namespace) -> list[Layer]:
    """Layers of the chosen language blocks that are large enough for experts.

    Raises:
        ModelError: If there is no such block.
    """
    loaded = in_float32(load_model(options.model))
    blocks = [block for block in loaded.family.blocks(loaded.model) if block.group == "language"]
    if not set(options.blocks) <= set(range(len(blocks))):
        raise ModelError(f"The language model has {len(blocks)} blocks.", f"Choose --blocks below {len(blocks)}.")
    groups = [g for number in options.blocks for g in linear_groups(blocks[number], loaded.family.siblings)]
    weights = [torch.cat([linear.weight.detach().float() for linear in group.linears]) for group in groups]
    method = QuantExperts(QuantExpertsOptions())
    collectors = []
    for group, weight in zip(groups, weights, strict=True):
        request = method.request(*weight.shape)
        if request is None:
            raise ValueError("Quant Experts measures something on every layer")
        collectors.append(StatisticsCollector(group.names[0], weight.shape[1], [weight], request, seed=0))
    data = Path(options.model) / "data"
    feed_inputs(
        loaded,
        encoded_batches(loaded, options.calibration or data / "calibration.jsonl", options.samples),
        groups,
        lambda number, tokens, kinds: collectors[number].update(tokens, kinds),
    )
    held: list[list[tuple[Tensor, Tensor]]] = [[] for _ in groups]
    feed_inputs(
        loaded,
        encoded_batches(loaded, options.evaluation or data / "evaluation.jsonl", options.questions),
        groups,
        lambda number, tokens, kinds: held[number].append((tokens.float(), kinds == IMAGE)),
    )
    return [
        Layer(
            ".".join(group.names[0].split(".")[-3:]),
            weight,
            collector.finish()[0],
            torch.cat([tokens for tokens, _ in parts]),
            torch.cat([image for _, image in parts]),
        )
        for group, weight, collector, parts in zip(groups, weights, collectors, held, strict=True)
        if shrink_to_layer(method.options, *weight.shape).experts
    ]


def energies(layer: QELinear, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Squared output error `[n, experts]` of every token with every expert; one column without experts."""
    columns = []
    for expert in range(max(layer.num_experts, 1)):
        if layer.num_experts:
            layer.__dict__["expert_index"] = lambda x, one=expert: torch.full(x.shape[:-1], one)
        columns.append((layer(tokens) - wanted).square().sum(1, dtype=torch.float64))
    layer.__dict__.pop("expert_index", None)
    return torch.stack(columns, dim=1)


def router_rank(weight: Tensor, experts: int) -> int:
    """Rank of int8 factors, with their scales, in the bytes of a float16 router; rounded down."""
    out_features, in_features = weight.shape
    return 16 * experts * in_features // (8 * (out_features + in_features) + 16)


def measure(layer: Layer, scheme: str, rounding: str, refine: str | None) -> Iterator[Row]:
    """One row per correction."""
    size = shrink_to_layer(QuantExpertsOptions(), *layer.weight.shape)
    ranks = {"none": 0, "rank": size.shared_rank + size.routed_rank}
    ranks["read"] = ranks["rank"] + router_rank(layer.weight, size.experts)
    ranks["stored"] = size.shared_rank + size.experts * size.routed_rank + router_rank(layer.weight, size.experts)
    choices: dict[str, dict[str, Any]] = {
        name: {"experts": 0, "shared_rank": rank, "shrink": False, "important_channels": size.important_channels}
        for name, rank in ranks.items()
    }
    choices |= {"experts": {}, "modality": {"assignment": "modality"}}
    if refine:
        choices["refined"] = {"refine": refine}
    wanted = layer.tokens @ layer.weight.T
    total = wanted.square().sum(1, dtype=torch.float64)
    for column, choice in choices.items():
        method = QuantExperts(QuantExpertsOptions(**ROUNDINGS[rounding], **choice))
        problem = LinearProblem(layer.name, layer.weight, get_scheme(scheme), layer.statistics, 0)
        made = QELinear(method.quantize(problem))
        error = energies(made, layer.tokens, wanted)
        picked = made.expert_index(layer.tokens)
        routed = error[:, 0] if picked is None else error.gather(1, picked.unsqueeze(1))[:, 0]
        found = {column: routed}
        if column == "experts":
            found |= {"random": error.mean(1), "oracle": error.amin(1)}
        bits = add_counts(layer_counts({layer.name: made}).values())
        for name, energy in found.items():
            kinds = (layer.image, ~layer.image)
            image, text = (float((energy[rows].sum() / total[rows].sum()).sqrt()) for rows in kinds)
            yield Row(layer.name, rounding, name, image, text, bits.stored_bits, bits.read_bits)


def summary(rows: Sequence[Row], rounding: str, kind: str) -> dict[str, float]:
    """Geometric mean over layers of every correction's error relative to the static one of equal read bytes."""
    base = {row.layer: getattr(row, kind) for row in rows if row.rounding == rounding and row.column == "read"}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.rounding == rounding and base[row.layer] > 0:
            ratios.setdefault(row.column, []).append(getattr(row, kind) / base[row.layer])
    return {column: float(np.exp(np.log(found).mean())) for column, found in ratios.items()}


def show(title: str, values: dict[str, float], form: str) -> None:
    """One line of a table."""
    cells = (f"{values[column]:{form}}" if column in values else "" for column in COLUMNS)
    print(f"{title:38}" + "".join(f"{cell:>10}" for cell in cells), flush=True)


def main() -> int:
    """Print the tables, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with data/calibration.jsonl and data/evaluation.jsonl")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 14, 26], help="numbers of language blocks")
    parser.add_argument("--scheme", choices=list(SCHEMES), default="w4a8")
    parser.add_argument("--rounding", nargs="+", choices=list(ROUNDINGS), default=list(ROUNDINGS))
    parser.add_argument("--refine", choices=["router", "all"], help="measure gradient refinement too")
    parser.add_argument("--calibration", type=Path, help="samples to calibrate on")
    parser.add_argument("--evaluation", type=Path, help="samples to judge on")
    parser.add_argument("--samples", type=int, default=128, help="number of calibration samples")
    parser.add_argument("--questions", type=int, default=100, help="number of held-out samples")
    options = parser.parse_args()
    rows: list[Row] = []
    try:
        layers = load_layers(options)
        print(f"{'relative error, %':38}" + "".join(f"{column:>10}" for column in COLUMNS))
        for layer in layers:
            for rounding in options.rounding:
                rows += (new := list(measure(layer, options.scheme, rounding, options.refine)))
                for kind in ("image", "text"):
                    values = {row.column: 100 * getattr(row, kind) for row in new}
                    show(f"{layer.name} {rounding} {kind}", values, ".3f")
            for bits in ("stored", "read"):
                show(f"{layer.name} bits {bits}", {row.column: getattr(row, bits) for row in new}, ".2f")
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\nerror relative to 'read', geometric mean over layers")
    means = {
        f"{rounding} {kind}": summary(rows, rounding, kind)
        for rounding in options.rounding
        for kind in ("image", "text")
    }
    for title, values in means.items():
        show(title, values, ".3f")
    tokens = {"image": int(layers[0].image.sum()), "text": int((~layers[0].image).sum())} if layers else {}
    print(json.dumps({
        "model": options.model, "scheme": options.scheme, "held_out_tokens": tokens, "relative": means,
        "rows": [asdict(row) for row in rows],
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
