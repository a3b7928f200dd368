"""Learned channel scales: what they are judged by, and that they are never worse than where they begin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge.numerics.schemes import get_scheme
from qe_edge.reconstruction.learned_scales import ScaleLearning, learn_inverse, output_error
from tests.layers import typed_layer
from tests.reference.grids import quantize_matrix, quantize_tokens


@pytest.mark.parametrize("power", [1, 2])
def test_the_error_is_that_of_the_layer(power: int) -> None:
    weight, x = typed_layer(16, 32, 200)
    inverse = torch.linspace(0.5, 2, 32).half()
    factor = inverse.double().numpy()
    codes = quantize_matrix(weight.double().numpy() / factor, 4, None, symmetric=True)
    rounded = quantize_tokens(x.double().numpy() * factor, 6)
    expected = (np.abs(rounded @ codes.T - (x.double() @ weight.double().T).numpy()) ** power).mean()
    assert output_error(weight, x, inverse, get_scheme("w4a6"), power) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("scheme", "power"), [("w4a6", 2), ("w3a8", 1), ("w3a16", 2)])
def test_learning_gains_and_never_loses(scheme: str, power: int) -> None:
    weight, x = typed_layer(48, 128, 600)
    bits = get_scheme(scheme)
    plain = output_error(weight, x, torch.ones(128).half(), bits, power)
    learning = ScaleLearning(steps=40, rate=0.02, power=power, seed=0)
    learned, again = (learn_inverse(weight, x, bits, [np.ones(128)], learning) for _ in range(2))
    assert torch.equal(learned, again)
    assert output_error(weight, x, learned, bits, power) < 0.97 * plain
    hasty = ScaleLearning(steps=4, rate=1.0, power=power, seed=0)  # so large steps that they only do harm
    kept = learn_inverse(weight, x, bits, [np.ones(128)], hasty)
    assert output_error(weight, x, kept, bits, power) <= plain
