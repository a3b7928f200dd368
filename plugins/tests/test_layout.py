"""Rung 1: packing has an inverse and puts every value where the tensor core's fragment map wants it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prepack import layout
from prepack.linear import CanonicalLinear, PackError
from prepack.pack import pack
from prepack.reference import dequantize_weight
from tests.cases import Mode, random_layer

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, chunks=st.integers(1, 3), blocks=st.integers(1, 3), sixteen_bit=st.booleans())
def test_weight_round_trip(seed: int, chunks: int, blocks: int, sixteen_bit: bool) -> None:
    nibbles = np.random.default_rng(seed).integers(0, 16, (128 * chunks, 32 * blocks)).astype(np.uint8)
    packed = layout.pack_weight(nibbles, sixteen_bit)
    assert packed.nbytes * 2 == nibbles.nbytes
    assert np.array_equal(layout.unpack_weight(packed, sixteen_bit), nibbles)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, groups=st.integers(1, 5), blocks=st.integers(1, 4))
def test_group_round_trip(seed: int, groups: int, blocks: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**16, (groups, 32 * blocks)).astype(np.uint16)
    assert np.array_equal(layout.unpack_groups(layout.pack_groups(values)), values)


@given(seed=seeds, left=st.integers(0, 31))
def test_words_turn_back(seed: int, left: int) -> None:
    packed = np.random.default_rng(seed).integers(0, 256, (3, 16)).astype(np.uint8)
    assert np.array_equal(layout.turn_words(layout.turn_words(packed, left), -left), packed)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, zeros=st.booleans(), act_bits=st.sampled_from([0, 8]), group_size=st.sampled_from([-1, 64, 128]))
def test_packed_layer_round_trip(seed: int, zeros: bool, act_bits: int, group_size: int) -> None:
    """(code - zero) * scale, rebuilt from what the kernels read, is the layer's weight to the last bit."""
    mode = Mode("any", act_bits=act_bits, group_size=group_size, zeros=zeros, experts=0, rank_shared=0)
    k = 256 if group_size == 128 else 192
    layer = random_layer(mode, k, 40, seed)
    packed = pack(layer, "f16")
    turned = zeros and act_bits != 0
    codes = layout.unpack_weight(
        layout.turn_words(packed.weight, -layout.TURN) if turned else packed.weight, act_bits == 0
    )
    if packed.zeros is None:
        centred = ((codes ^ 8).astype(np.int64) - 8)[:k, :40] * 16
    else:
        rows = layout.unpack_groups(packed.zeros).astype(np.int64)
        step = 8 if act_bits else 1
        repeated = np.repeat(rows, 256 // len(rows), axis=0)
        centred = (codes.astype(np.int64) * step - repeated)[:k, :40]
    scales = np.ones((1, 40))
    if packed.scales is not None:
        scales = layout.unpack_groups(packed.scales).view(np.float16).astype(np.float64)[:, :40]
    repeated_scales = np.repeat(scales, k if group_size < 0 else group_size, axis=0)[:k]
    unit = 1.0 if act_bits else 2.0**-24
    rebuilt = centred * unit * repeated_scales * packed.columns[0, :40]
    assert np.allclose(rebuilt, dequantize_weight(layer), rtol=1e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, k=st.integers(1, 100), tiles=st.integers(1, 4), dtype=st.sampled_from([np.int8, np.uint16]))
def test_down_round_trip(seed: int, k: int, tiles: int, dtype: type[np.integer]) -> None:
    down = np.random.default_rng(seed).integers(0, 127, (k, 16 * tiles)).astype(dtype)
    assert np.array_equal(layout.unpack_down(layout.pack_down(down), k), down)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, tiles=st.integers(1, 4), blocks=st.integers(1, 4))
def test_up_round_trip(seed: int, tiles: int, blocks: int) -> None:
    up = np.random.default_rng(seed).integers(0, 127, (16 * tiles, 32 * blocks)).astype(np.int8)
    assert np.array_equal(layout.unpack_up(layout.pack_up(up)), up)


def test_int8_weight_order_is_the_documented_one() -> None:
    """One weight at a time: byte b of word c of a lane holds row 16c + 4*(lane%4) + b and, above it, that row + 64."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        k, n = int(rng.integers(256)), int(rng.integers(64))
        nibbles = np.zeros((256, 64), np.uint8)
        nibbles[k, n] = 15
        block, chunk, tile, lane, byte = (int(i[0]) for i in np.nonzero(layout.pack_weight(nibbles, False)))
        high = layout.pack_weight(nibbles, False)[block, chunk, tile, lane, byte] >= 16
        assert (chunk, block * 4 + tile) == (k // 128, n // 8)
        assert lane // 4 == n % 8
        assert 16 * (byte // 4) + 4 * (lane % 4) + byte % 4 + (64 if high else 0) == k % 128


def test_bytes_are_not_padded_beyond_the_tile() -> None:
    packed = pack(random_layer(Mode("w4a8", experts=0, rank_shared=0), 1536, 1536), "f16")
    assert packed.weight.nbytes == 1536 * 1536 // 2


def test_refuses_what_does_not_fit() -> None:
    q = np.zeros((128, 32), np.int8)
    with pytest.raises(PackError, match="scales has shape"):
        pack(CanonicalLinear(q, np.ones((2, 32), np.float32)), "f16")
    with pytest.raises(PackError, match="no router"):
        pack(
            CanonicalLinear(
                q, np.ones((1, 32), np.float32), down=np.ones((128, 16), np.float32), up=np.ones((16, 32), np.float32),
                rank_routed=8, num_experts=2,
            ),
            "f16",
        )  # fmt: skip
    with pytest.raises(PackError, match="outside -8 to 7"):
        pack(CanonicalLinear(q + np.int8(9), np.ones((1, 32), np.float32)), "f16")
