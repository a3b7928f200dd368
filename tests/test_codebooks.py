"""Lattice points and binary matrices: against plain searches and step-by-step references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.layers.linear import QELinear
from qe_edge.methods.qbb import greedy_bases
from qe_edge.methods.quipsharp import rounded_block
from qe_edge.numerics.codebooks import FINE, decode_codebook, e8p_codes, e8p_points, nearest_e8p
from qe_edge.system.errors import RecipeError
from tests.layers import correlated_layer

ALL = torch.arange(1 << 16)


def effective(layer: QELinear) -> torch.Tensor:
    layer.activation_bits = 0
    return layer(torch.eye(layer.in_features)).T.double()


def test_points_are_those_of_the_lattice() -> None:
    points = e8p_points(ALL)
    assert len(torch.unique(points, dim=0)) == 1 << 16
    half_integers = points - ((ALL >> 15) * 2 - 1).unsqueeze(1) * 0.25
    assert ((half_integers - 0.5) % 1 == 0).all()
    assert (half_integers.sum(1) % 2 == 0).all()  # E8 and a quarter of all ones
    assert half_integers.square().sum(1).max() == 12


def test_the_nearest_point_is_found() -> None:
    points, vectors = e8p_points(ALL).double(), torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    vectors[:5] = points[[0, 77, 300, 40_000, 65_535]].float()
    found = (points[nearest_e8p(vectors)] - vectors).norm(dim=1)
    torch.testing.assert_close(found, torch.cdist(vectors.double(), points).min(1).values)


@pytest.mark.parametrize(("bits", "error"), [(2, 0.094), (4, 0.0105)])
def test_codes_decode_to_their_points(bits: int, error: float) -> None:
    vectors = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    codes, points = rounded_block(vectors, bits)
    signed = torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8)
    decoded = decode_codebook(signed, torch.full((4000, 1), 2.0, dtype=torch.float16), bits, "e8p")
    torch.testing.assert_close(decoded, 2 * points)
    assert float((points - vectors).square().mean()) < error
    assert FINE < 1
    assert e8p_codes(torch.tensor([[0xABCD]]))[0].tolist() == [1, 3, 0, 3, 3, 2, 2, 2]


def test_quipsharp_spreads_the_errors_of_its_blocks() -> None:
    """The same blocks, with the Hessian of what is to come inverted anew before each."""
    weight, x = correlated_layer(12, 48, 400)
    layer = quantize_linear(weight, x, make_recipe(method="quipsharp", scheme="w2a16"))
    parts = layer.parts
    assert parts is not None
    bases = [basis.matrix().numpy() for side in ("in", "out") if (basis := parts.basis(side))]
    gram = (x.double().T @ x.double() / len(x)).numpy()
    hessian = bases[0].T @ gram @ bases[0]
    hessian = hessian + 0.01 * np.diag(hessian).mean() * np.eye(48)
    w = np.linalg.inv(bases[1]) @ weight.double().numpy() @ np.linalg.inv(bases[0]).T
    scale, decoded = layer.scales.double().numpy(), np.zeros_like(w)
    for start in range(0, 48, 8):
        inverse, span = np.linalg.inv(hessian[start:, start:]), slice(start, start + 8)
        points = rounded_block(torch.from_numpy(w[:, span] / scale).float(), 2)[1].double().numpy()
        decoded[:, span] = points * scale
        error = w[:, span] - decoded[:, span]
        w[:, start:] -= error @ np.linalg.solve(inverse[:8, :8], inverse[:8])
    expected = bases[1] @ decoded @ bases[0].T
    found = effective(layer).numpy()
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected - weight.numpy())


def test_two_bits_of_the_lattice_beat_two_bits_of_integers() -> None:
    weight, x = correlated_layer(32, 128, 700)
    target = x @ weight.T
    losses = {
        method: float((quantize_linear(weight, x, make_recipe(method=method, scheme="w2a16"))(x) - target).norm())
        for method in ("quipsharp", "qbb", "gptq", "rtn")
    }
    assert losses["quipsharp"] < 0.85 * losses["gptq"]
    assert losses["qbb"] < 0.85 * losses["gptq"] < losses["rtn"]


def test_what_the_lattice_cannot_hold_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="no codebook of 3 bits, which the scheme 'w3a16'"):
        make_recipe(method="quipsharp", scheme="w3a16")
    with pytest.raises(RecipeError, match="no multiple of 8 inputs"):
        quantize_linear(torch.ones(4, 12), torch.ones(3, 12), make_recipe(method="quipsharp", scheme="w2a16"))


def test_binary_matrices_are_taken_off_one_by_one() -> None:
    weight = torch.tensor([[3.0, -1.0, 0.5, -0.5]], dtype=torch.float64)
    signs, scales = greedy_bases(weight, 2)
    assert signs[:, 0].tolist() == [[1, -1, 1, -1], [1, 1, -1, 1]]
    assert scales.tolist() == [[1.25, 0.875]]
    codes = torch.tensor([[-1, 0, 1, -2]], dtype=torch.int8)  # bits 11, 00, 01, 10
    assert decode_codebook(codes, torch.tensor([[1.0, 0.25]]), 2, "binary").tolist() == [[1.25, -1.25, 0.75, -0.75]]


def test_fits_and_choices_of_binary_matrices_never_lose() -> None:
    weight, x = correlated_layer(16, 64, 400)
    target, losses = x @ weight.T, []
    for rounds in (0, 1, 3, 12):
        layer = quantize_linear(weight, x, make_recipe(method="qbb", scheme="w3a16", options={"rounds": rounds}))
        assert layer.scales.shape == (16, 3)
        losses.append(float((layer(x) - target).norm()))
    assert losses[0] > 2 * losses[1] > 2 * 0.99 * losses[2] > 2 * 0.98 * losses[3]
