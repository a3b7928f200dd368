r"""Whether a GPU and the CPU make the same model of one recipe, up to rounding.

    python benchmarks/device_agreement.py --device cuda

Every recipe quantizes the demo on the CPU and on the device. Both models are compared with the original on held-out
questions. They agree where the means of the layers' relative errors lie within 1 % of each other, and the divergences
on answer tokens (KL, mean) within 5 %. The exit code is 1 where they do not.

The divergence on all text tokens is shown, but decides nothing: a few tokens make it. On the CPU alone it went from
1.1e-4 to 1.5e-4 (qe w4a8) when the Gram matrices were changed by 1e-6, the rounding of their float32 products; on
answer tokens by 6 %, the layers' errors by 0.1 %.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.validate.comparison import Comparison
from qe_edge.validate.subjects import in_float32

WITHIN, LAYERS_WITHIN = 0.05, 0.01
RECIPES: dict[str, dict[str, Any]] = {
    "qe w4a8": {"method": "qe", "scheme": "w4a8"},
    "gptq w3a16": {"method": "gptq", "scheme": "w3a16"},
    "qe w4a8, 4.5 bits": {"method": "qe", "scheme": "w4a8", "budget": {"bits": 4.5}},
    "quarot w4a8": {"method": "quarot", "scheme": "w4a8"},
    "qe w4a16": {"method": "qe", "scheme": "w4a16"},
    "qe w4a8, INT4 factors": {"method": "qe", "scheme": "w4a8", "options": {"adapter_dtype": "int4"}},
}


@dataclass(frozen=True)
class Measured:
    """One model beside the original.

    Attributes:
        kl: Mean KL(original || this) in nats on answer tokens.
        kl_text: The same on all text tokens.
        error: Mean over the layers of the relative error of their outputs.
        layers: The relative error of every layer.
        seconds: Time to quantize.
    """

    kl: float
    kl_text: float
    error: float
    layers: dict[str, float]
    seconds: float


def measure(original: LoadedModel, samples: Sequence[Sample], keys: dict[str, Any], device: str) -> Measured:
    """Quantize the demo on a device and compare it with the original."""
    started = time.perf_counter()
    quantized, _ = quantize("demo", make_recipe(**keys), device=device)
    seconds = time.perf_counter() - started
    comparison = Comparison(original, in_float32(quantized), None)
    comparison.measure_heldout(samples, lambda _: None)
    layers = {one.name: float(one.heldout.all or 0.0) for one in comparison.layer_errors()}
    found = comparison.distances["quantized"]
    return Measured(
        found.answer.mean_divergence(), found.text.mean_divergence(), fmean(layers.values()), layers, seconds
    )


def agree(one: Measured, other: Measured, within: float = WITHIN) -> bool:
    """Whether two models are the same up to rounding."""
    return abs(one.error / other.error - 1) <= LAYERS_WITHIN and abs(one.kl / other.kl - 1) <= within


def main() -> int:
    """Print a line per recipe, and a JSON line at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES)[:3])
    parser.add_argument("--limit", type=int, default=200, help="questions")
    options = parser.parse_args()
    original, samples = in_float32(load_model("demo")), load_evaluation("demo")[: options.limit]
    rows, apart = {}, []
    for name in options.recipes:
        there, here = (measure(original, samples, RECIPES[name], device) for device in (options.device, "cpu"))
        rows[name] = {"device": asdict(there), "cpu": asdict(here)}
        furthest = max(here.layers, key=lambda layer: abs(there.layers[layer] / here.layers[layer] - 1))
        print(
            f"{name:22} KL {there.kl:.3e} / {here.kl:.3e} = {there.kl / here.kl:.3f}, text "
            f"{there.kl_text:.3e} / {here.kl_text:.3e}   layers' error "
            f"{there.error:.4e} / {here.error:.4e} = {there.error / here.error:.3f}   {there.seconds:.1f} / "
            f"{here.seconds:.1f} s   furthest {there.layers[furthest] / here.layers[furthest]:.3f} {furthest}",
            flush=True,
        )
        if not agree(there, here):
            apart.append(name)
    print(json.dumps({"script": "device_agreement", "device": options.device, "apart": apart, "rows": rows}))
    return int(bool(apart))


if __name__ == "__main__":
    sys.exit(main())
