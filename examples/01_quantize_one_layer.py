"""Quantize one linear layer, and look at the error that each method leaves.

    python examples/01_quantize_one_layer.py

The inputs have a few large channels, as the inputs of language models do.
"""

import torch

import qe_edge

SCHEME = "w4a8"  # weights of 4 bits, activations of 8 bits


def relative_error(layer: qe_edge.QELinear, weight: torch.Tensor, tokens: torch.Tensor) -> float:
    """Error of the layer's output, relative to the output of the original weight."""
    wanted = tokens @ weight.T
    return float((layer(tokens) - wanted).norm() / wanted.norm())


def main() -> None:
    """Print a table of errors."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 128, generator=generator)  # [out, in]
    tokens = torch.randn(3000, 128, generator=generator)  # [tokens, in]
    tokens[:, :4] *= 20
    calibration, held_out = tokens[:2000], tokens[2000:]

    for method in ("rtn", "gptq", "qe"):
        recipe = qe_edge.make_recipe(method=method, scheme=SCHEME)
        layer = qe_edge.quantize_linear(weight, calibration, recipe)
        print(f"{method:>5}: {relative_error(layer, weight, held_out):.2%} error on tokens that it has not seen")


if __name__ == "__main__":
    main()
