"""Number grids against the scalar reference, and packing against its inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qe_edge.numerics.grids import (
    PER_CHANNEL,
    WeightGrid,
    fake_quantize_activation,
    pack_codes,
    pack_int4,
    packed_width,
    quantize_int8,
    quantize_weight,
    unpack_codes,
    unpack_int4,
)
from qe_edge.system.errors import NumericalError, RecipeError
from tests.reference.grids import quantize_matrix, quantize_tokens

WEIGHTS = hnp.arrays(
    np.float32, (3, 64), elements=st.floats(-100, 100, width=32, allow_nan=False, allow_subnormal=False)
)


@settings(max_examples=60)
@given(weight=WEIGHTS, bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([None, 16, 32]), symmetric=st.booleans())
def test_weight_grid_equals_scalar_reference(weight: np.ndarray, bits: int, group: int | None, symmetric: bool) -> None:
    grid = WeightGrid(bits, group or PER_CHANNEL, symmetric)
    decoded = quantize_weight(torch.from_numpy(weight), grid).decode().numpy()
    expected = quantize_matrix(weight.astype(np.float64), bits, group, symmetric=symmetric)
    scale = np.abs(weight).max() / (2 ** (bits - 1) - 1) * 2 + 1e-5
    # float32 division may fall on the other side of a half-way point than float64: at most one code, and rarely
    differing = np.abs(decoded - expected) > 1e-4 * scale
    assert differing.mean() <= 0.02
    assert np.abs(decoded - expected).max() <= 1.01 * scale


@settings(max_examples=60)
@given(
    weight=WEIGHTS, bits=st.sampled_from([2, 3, 4]), group=st.sampled_from([PER_CHANNEL, 16]), symmetric=st.booleans()
)
def test_zero_entries_decode_to_exactly_zero(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> None:
    weight = weight.copy()
    weight[:, ::3] = 0.0
    decoded = quantize_weight(torch.from_numpy(weight), WeightGrid(bits, group, symmetric)).decode()
    assert (decoded[:, ::3] == 0).all()


@settings(max_examples=60)
@given(weight=WEIGHTS, bits=st.sampled_from([3, 4]))
def test_codes_fit_their_width(weight: np.ndarray, bits: int) -> None:
    for symmetric in (True, False):
        quantized = quantize_weight(torch.from_numpy(weight), WeightGrid(bits, 16, symmetric))
        assert quantized.codes.min() >= -(2 ** (bits - 1))
        assert quantized.codes.max() <= 2 ** (bits - 1) - 1


@given(codes=hnp.arrays(np.int8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(-8, 7)))
def test_unpacking_inverts_packing(codes: np.ndarray) -> None:
    tensor = torch.from_numpy(codes)
    packed = pack_int4(tensor)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], (codes.shape[1] + 1) // 2)
    assert torch.equal(unpack_int4(packed, codes.shape[1]), tensor)


@given(data=st.data(), bits=st.integers(2, 4), rows=st.integers(1, 5), columns=st.integers(1, 33))
def test_unpacking_inverts_packing_of_any_width(data: st.DataObject, bits: int, rows: int, columns: int) -> None:
    limits = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = torch.from_numpy(data.draw(hnp.arrays(np.int8, (rows, columns), elements=limits)))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(columns, bits))
    assert torch.equal(unpack_codes(packed, columns, bits), codes)
    stream = "".join(format(byte, "08b")[::-1] for byte in packed[0].tolist())  # low bits first
    expected = "".join(format(code % 2**bits, f"0{bits}b")[::-1] for code in codes[0].tolist())
    assert stream.startswith(expected)


def test_low_nibble_comes_first() -> None:
    assert pack_int4(torch.tensor([[1, -1]], dtype=torch.int8)).item() == 0xF1


@settings(max_examples=40)
@given(
    tokens=hnp.arrays(np.float32, (4, 32), elements=st.floats(-50, 50, width=32, allow_subnormal=False)),
    bits=st.sampled_from([6, 8]),
)
def test_activation_grid_equals_reference(tokens: np.ndarray, bits: int) -> None:
    quantized = fake_quantize_activation(torch.from_numpy(tokens), bits).numpy()
    expected = quantize_tokens(tokens, bits)  # float32 throughout, as inference computes it
    np.testing.assert_allclose(quantized, expected, rtol=1e-6, atol=1e-7)


def test_sixteen_bit_activations_pass_unchanged() -> None:
    x = torch.randn(3, 5)
    assert fake_quantize_activation(x, 0) is x


def test_int8_factors_lose_at_most_half_a_step() -> None:
    matrix = torch.randn(6, 40) * torch.logspace(-3, 3, 6).unsqueeze(1)
    codes, scales = quantize_int8(matrix, 0)
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((codes.float() * scales.float().unsqueeze(1) - matrix).abs() <= 0.6 * step).all()


@pytest.mark.parametrize(
    ("in_features", "wanted", "expected"),
    [(1536, 128, 128), (576, 128, 64), (3420, 128, PER_CHANNEL), (48, 128, 16), (1536, PER_CHANNEL, PER_CHANNEL)],
)
def test_group_size_is_the_largest_power_of_two_that_divides(in_features: int, wanted: int, expected: int) -> None:
    assert WeightGrid(4, wanted).resolve_group(in_features) == expected


def test_bad_grids_and_values_are_refused() -> None:
    with pytest.raises(RecipeError):
        WeightGrid(5)
    with pytest.raises(RecipeError):
        WeightGrid(4, 8)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NumericalError):
            quantize_weight(torch.tensor([[1.0, bad]]), WeightGrid(4))
