r"""What codes lose on the tokens that they were chosen on, and on others: with shrunk Gram matrices and with polishing.

    python benchmarks/assemble_real_models.py smollm2 out/smollm2
    python benchmarks/unseen_tokens.py out/smollm2 --layers o_proj down_proj --blocks 2 14 27

SmolLM2 is rotated, as inside a budget. Codes are chosen on calibration samples; the other tokens are those of as many
other calibration samples. Losses are squared output errors, as a share of the output, in ten thousandths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qe_edge.calibration.sources import load_samples
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.rotation import rotate_language_model
from qe_edge.numerics.schemes import SCHEMES
from qe_edge.quantization.job import encoded_batches
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.polishing import polished
from qe_edge.reconstruction.shrinkage import chosen_strength, shrunk_gram
from qe_edge.system.errors import QEError
from qe_edge.validate.subjects import in_float32

DAMPING, ROUNDS = 0.01, 4
WAYS = ("gptq", "polished", "shrunk", "shrunk, polished")


def inputs_of(loaded: LoadedModel, names: Sequence[str], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """What layers read `[tokens, in]` float32, without padding."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    mask = torch.ones(0)

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: found[name].append(inputs[0][mask].float())

    handles = [loaded.model.get_submodule(name).register_forward_pre_hook(listen(name)) for name in names]
    for batch in encoded_batches(loaded, samples):
        mask = torch.from_numpy(batch.attention_mask).bool()
        with torch.no_grad():
            loaded.model(**loaded.family.torch_inputs(batch), use_cache=False, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def gram_of(x: Tensor) -> Tensor:
    """Gram matrix `[in, in]` float64, per token."""
    return (x.T @ x).double() / len(x)


def energy(rows: Tensor, gram: Tensor) -> float:
    """Squared output of `rows` `[out, in]` per token."""
    return float(((rows @ gram) * rows).sum())


def losses(weight: Tensor, seen: Tensor, other: Tensor, scheme: str) -> Iterator[tuple[str, list[float]]]:
    """By way of rounding, the loss on seen and on other tokens."""
    grid, gram = SCHEMES[scheme].weight, gram_of(seen)
    shrunk = shrunk_gram(gram, len(seen), chosen_strength(seen))
    for way in WAYS:
        matrix = (shrunk if "shrunk" in way else gram).numpy()
        codes = gptq_round(weight, matrix, grid, DAMPING, clip=True)
        if "polished" in way:
            codes = polished(codes, weight, matrix, grid, DAMPING, ROUNDS)
        error = (weight - codes.decode()).double()
        energies = [
            [float(((rows @ part) * rows).sum()) for rows in (error, weight.double())]
            for part in (gram, gram_of(other))
        ]
        yield way, [1e4 * lost / whole for lost, whole in energies]


def main() -> int:
    """Print a line a layer, the medians of the ratios, and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="SmolLM2 as assemble_real_models.py makes it")
    parser.add_argument("--layers", nargs="+", default=["q_proj", "o_proj", "up_proj", "down_proj"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 14, 27])
    parser.add_argument("--samples", type=int, default=32, help="calibration samples (default: %(default)s)")
    parser.add_argument("--scheme", choices=tuple(SCHEMES), default="w4a8")
    options = parser.parse_args()
    try:
        loaded = load_model(str(options.model))
        samples = load_samples(str(options.model / "data" / "calibration.jsonl"), 2 * options.samples)
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    rotate_language_model(loaded, 0)
    in_float32(loaded)
    blocks = [block for block in loaded.family.blocks(loaded.model) if block.group == "language"]
    names = [
        f"{blocks[number].name}.{name}"
        for number in options.blocks
        for name, module in blocks[number].module.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in options.layers
    ]
    seen, other = (inputs_of(loaded, names, samples[part::2]) for part in (0, 1))
    found: dict[str, dict[str, list[float]]] = {}
    print(
        f"{'':40}" + "".join(f"{way:>24}" for way in WAYS) + "\n" + " " * 40 + f"{'seen':>12}{'other':>12}" * len(WAYS)
    )
    for name in names:
        weight = loaded.model.get_submodule(name).get_parameter("weight").detach()
        found[name] = dict(losses(weight, seen[name], other[name], options.scheme))
        print(f"{name:40}" + "".join(f"{part:12.2f}" for way in WAYS for part in found[name][way]), flush=True)
    for way in WAYS[1:]:
        ratios = [one[way][1] / one["gptq"][1] for one in found.values()]
        print(f"{way}: loss on other tokens over GPTQ's, median {statistics.median(ratios):.3f}")
    print(json.dumps({"script": "unseen_tokens", "losses": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
