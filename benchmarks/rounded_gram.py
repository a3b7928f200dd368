r"""Gram matrices of inputs rounded to INT8 against BLAS' float32: time, and what GPTQ's codes lose by it.

    python benchmarks/assemble_real_models.py smollm2 out/smollm2
    python benchmarks/rounded_gram.py out/smollm2

The first table multiplies random tokens: medians, and the memory beside the matrix. The second takes every layer of
the model whose input has at least `--least` channels. Half of the model's own calibration samples make its Gram
matrix, in float64 and from rounded inputs, and GPTQ rounds with each; the loss is the squared output error on the other
half, as a share of the output. `--least 1` rounds the inputs of all layers, which `qe-edge` does from 1024 channels on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.linalg.blas import ssyrk
from torch import Tensor, nn

from qe_edge.calibration.sources import load_samples
from qe_edge.models.loading import load_model
from qe_edge.numerics.int8_products import LEAST_SIDE, add_gram, round_channels
from qe_edge.numerics.schemes import SCHEMES
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.system.device import multiplies_int8
from qe_edge.system.errors import QEError, RecipeError
from qe_edge.validate.subjects import in_float32

WIDTHS = (1536, 4864, 8960)
TOKENS = 4096  # of a chunk
DAMPING = 0.01


def rounded(x: np.ndarray, largest: np.ndarray, total: Tensor) -> None:
    """Add the Gram matrix of rounded tokens `[n, in]` to the upper triangle of `total`, given max |x| `[in]`."""
    add_gram(total, *round_channels(x, largest))


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Median time of a call, after one that is not counted."""
    taken = []
    for _ in range(repeat + 1):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def compare_speed(repeat: int) -> dict[int, float]:
    """Print times for every width; ratios by width."""
    print(f"{'channels':>8} {'float32':>9} {'INT8':>9}   times as fast   memory beside the matrix")
    ratios = {}
    for width in WIDTHS:
        x = np.random.default_rng(0).standard_normal((TOKENS, width), np.float32)
        total, whole = torch.zeros(width, width), np.zeros((width, width), np.float32, order="F")
        exact = seconds(partial(ssyrk, 1.0, x.T, beta=1.0, c=whole, lower=1, overwrite_c=1), repeat)
        largest = np.abs(x).max(0)  # the statistics have it anyway
        fast = seconds(partial(rounded, x, largest, total), repeat)
        ratios[width] = exact / fast
        codes = f"none, {x.size / 2**20:.0f} MiB of codes"
        print(f"{width:8} {exact:7.3f} s {fast:7.3f} s {ratios[width]:15.1f}   {codes}")
    return ratios


def grams(folder: Path, least: int, count: int) -> dict[str, tuple[nn.Linear, list[Tensor]]]:
    """Every wide layer with its Gram matrices: exact and rounded of the first samples, exact of the others."""
    loaded = in_float32(load_model(str(folder)))
    samples = load_samples(str(folder / "data" / "calibration.jsonl"), count)
    layers: dict[str, tuple[nn.Linear, list[Tensor]]] = {}
    half = 0

    def hook(name: str) -> Callable[..., None]:
        def listen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            exact, rough, held = layers[name][1]
            (held if half else exact).add_((x.T @ x).double())
            if not half:
                rounded(x.numpy(), x.abs().amax(0).numpy(), rough)

        return listen

    for block in loaded.family.blocks(loaded.model):
        for name, module in block.module.named_modules():
            if isinstance(module, nn.Linear) and module.in_features >= least:
                side = module.in_features
                layers[f"{block.name}.{name}"] = module, [torch.zeros(side, side, dtype=torch.float64) for _ in "123"]
                module.register_forward_pre_hook(hook(f"{block.name}.{name}"))
    if not layers:
        raise RecipeError(f"No layer of {folder} has {least} input channels.", "Choose a lower --least.")
    with torch.no_grad():
        for index, sample in enumerate(samples):
            half = int(2 * index >= len(samples))
            encoded = loaded.family.encode(loaded.processor, [sample], answers=True)
            loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False)
    return layers


def compare_losses(layers: dict[str, tuple[nn.Linear, list[Tensor]]], scheme: str) -> list[float]:
    """Losses of codes from rounded Gram matrices, over those from exact ones."""
    grid = SCHEMES[scheme].weight
    ratios = []
    for layer, (exact, rough, held) in layers.values():
        weight = layer.weight.detach()
        losses = []
        for gram in (exact, rough.triu() + rough.triu(1).T):
            error = (weight - gptq_round(weight, gram.numpy(), grid, DAMPING, clip=True).decode()).double()
            losses.append(float(((error @ held) * error).sum()))
        ratios.append(losses[1] / losses[0])
    return ratios


def main() -> int:
    """Print both tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder of a model made by assemble_real_models.py")
    parser.add_argument("--least", type=int, default=LEAST_SIDE, help="channels from which layers are compared")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--scheme", choices=tuple(SCHEMES), default="w3a16")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    if not multiplies_int8():
        print("torch names no INT8 products of this processor: qe-edge uses float32 here.")
    try:
        layers = grams(options.model, options.least, options.samples) if options.model else {}
    except QEError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result: dict[str, object] = {"script": "rounded_gram", "speed": compare_speed(options.repeat)}
    if layers:
        ratios = compare_losses(layers, options.scheme)
        print(
            f"{len(ratios)} layers, {options.scheme}: GPTQ's loss with rounded inputs over that without: median "
            f"{statistics.median(ratios):.4f}, geometric mean {statistics.geometric_mean(ratios):.4f}, "
            f"{min(ratios):.3f} to {max(ratios):.3f}"
        )
        result["losses"] = ratios
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
