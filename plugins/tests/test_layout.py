"""Rung 1: packing has an inverse and puts every value where the tensor core's fragment map wants it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from emulator.build import ROOT
from prepack import layout
from prepack.linear import CanonicalLinear, PackError
from prepack.pack import pack
from prepack.reference import dequantize_weight
from prepack.width import weight_bits
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
@given(seed=seeds, chunks=st.integers(1, 3), blocks=st.integers(1, 3), sixteen_bit=st.booleans())
def test_3_bit_weight_round_trip(seed: int, chunks: int, blocks: int, sixteen_bit: bool) -> None:
    codes = np.random.default_rng(seed).integers(0, 8, (128 * chunks, 32 * blocks)).astype(np.uint8)
    packed = layout.pack_weight3(codes, sixteen_bit)
    assert packed.nbytes * 8 == codes.nbytes * 3
    assert np.array_equal(layout.unpack_weight3(packed, sixteen_bit), codes)


@pytest.mark.parametrize("sixteen_bit", [False, True])
def test_3_bit_codes_take_every_bit_once(sixteen_bit: bool) -> None:
    """One weight at a time: each sets three bits of its own, in the words of its lane and column tile."""
    taken = np.zeros((1, 1, 3, 32, 16), np.uint8)
    for k in range(128):
        for n in (0, 13, 31):
            codes = np.zeros((128, 32), np.uint8)
            codes[k, n] = 7
            packed = layout.pack_weight3(codes, sixteen_bit)
            assert int(np.bitwise_count(packed).sum()) == 3
            assert not np.any(packed & taken)
            lanes, places = np.nonzero(packed[0, 0].any(axis=0))
            pair = k % 8 // 2 if sixteen_bit else k % 16 // 4
            assert set(lanes.tolist()) == {4 * (n % 8) + pair}
            assert set((places // 4).tolist()) == {n // 8}
            taken |= packed


def test_3_bit_codes_stand_where_the_plan_says() -> None:
    """kCodeShifts3 of include/qe_edge/args.h, which x makes up for, against the layout of whole codes."""
    text = (ROOT / "include/qe_edge/args.h").read_text()
    shifts = int(re.findall(r"kCodeShifts3 = (0x[0-9a-f]+);", text, re.IGNORECASE)[0], 16)
    for register in range(15):
        codes = np.zeros((128, 32), np.uint8)
        codes[8 * register, 0] = 1
        words = layout.pack_weight3(codes, True).view(np.uint32).reshape(3, -1)[:, 0]  # of lane 0 and column 0
        word = int(np.flatnonzero(words)[0])
        bit = int(words[word]).bit_length() - 1
        assert shifts >> 4 * register & 15 == (bit if bit < 9 else bit - (9 - word))


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
@given(
    seed=seeds, zeros=st.booleans(), act_bits=st.sampled_from([0, 8]), group_size=st.sampled_from([-1, 64, 128]),
    weight_bits=st.sampled_from([3, 4]),
)  # fmt: skip
def test_packed_layer_round_trip(seed: int, zeros: bool, act_bits: int, group_size: int, weight_bits: int) -> None:
    """(code - zero) * scale, rebuilt from what the kernels read, is the layer's weight to the last bit."""
    mode = Mode(
        "any", act_bits=act_bits, group_size=group_size, zeros=zeros, experts=0, rank_shared=0, weight_bits=weight_bits
    )
    k = 256 if group_size == 128 else 192
    layer = random_layer(mode, k, 40, seed)
    packed = pack(layer, "f16")
    turned = zeros and act_bits != 0
    assert packed.weight_bits == (3 if weight_bits == 3 and not turned else 4)
    assert packed.weight.nbytes == 256 * 64 * packed.weight_bits // 8
    unpack, sign = (layout.unpack_weight3, 4) if packed.weight_bits == 3 else (layout.unpack_weight, 8)
    codes = unpack(layout.turn_words(packed.weight, -layout.TURN) if turned else packed.weight, act_bits == 0)
    if packed.zeros is None:
        centred = ((codes ^ sign).astype(np.int64) - sign)[:k, :40] * 128 // sign
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


@settings(max_examples=25, deadline=None)
@given(seed=seeds, k=st.integers(1, 100), tiles=st.integers(1, 4))
def test_4_bit_down_round_trip(seed: int, k: int, tiles: int) -> None:
    down = np.random.default_rng(seed).integers(-8, 8, (k, 16 * tiles)).astype(np.int8)
    packed = layout.pack_down4(down)
    assert packed.dtype == np.uint8 and packed.nbytes == layout.round_up(k, 32) * 16 * tiles // 2
    assert np.array_equal(layout.unpack_down4(packed, k), down)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, tiles=st.integers(1, 4), blocks=st.integers(1, 4))
def test_4_bit_up_round_trip(seed: int, tiles: int, blocks: int) -> None:
    up = np.random.default_rng(seed).integers(-8, 8, (16 * tiles, 32 * blocks)).astype(np.int8)
    packed = layout.pack_up4(up)
    assert packed.dtype == np.uint8 and packed.nbytes * 2 == up.nbytes
    assert np.array_equal(layout.unpack_up4(packed), up)


def test_4_bit_factors_stand_where_the_kernels_look() -> None:
    """One value at a time: nibbles i and i + 4 of a word are the halves of register i of an mma fragment."""
    rng = np.random.default_rng(5)
    for _ in range(100):
        k, r, n = int(rng.integers(64)), int(rng.integers(32)), int(rng.integers(64))
        down, up = np.zeros((64, 32), np.int8), np.zeros((32, 64), np.int8)
        down[k, r] = up[r, n] = -8 + int(rng.integers(8))  # never 0; stored with 8 added
        tile, block, lane, (word, register, half) = _place(layout.pack_down4(down))
        assert (tile, block, lane // 4) == (r // 16, k // 32, r % 8)
        assert (8 * (lane % 4) + 4 * word + 2 * (register // 2) + half, register % 2) == (k % 32, r % 16 // 8)
        tile, block, lane, (word, register, half) = _place(layout.pack_up4(up))
        assert (tile, block, lane // 4, word) == (r // 16, n // 16, n % 8, 0)
        assert (2 * (lane % 4) + 8 * (register % 2) + half, register // 2) == (r % 16, n % 16 // 8)


def _place(packed: NDArray[np.uint8]) -> tuple[int, int, int, tuple[int, int, int]]:
    """Tile, block and lane of the one value that is not 0, and its word, register and half."""
    words = packed.view(np.uint32) ^ np.uint32(0x88888888)
    tile, block, lane, word = (int(i[0]) for i in np.nonzero(words))
    nibble = (int(words[tile, block, lane, word]).bit_length() - 1) // 4
    return tile, block, lane, (word, nibble % 4, nibble // 4)


@pytest.mark.parametrize("beyond", [None, "down", "up"])
def test_one_value_beyond_4_bits_makes_8_of_both_factors(beyond: str | None) -> None:
    layer = random_layer(Mode("int4", adapter_bits=4, experts=0), 100, 40)
    if beyond:
        for value in (-9, 8):
            values = getattr(layer, beyond).copy()
            values[3, 5] = value
            packed = pack(replace(layer, **{beyond: values}), "f16")
            assert packed.adapter_bits == 8 and packed.down is not None and packed.down.dtype == np.int8
        return
    packed = pack(layer, "f16")
    assert packed.adapter_bits == 4 and packed.down is not None and packed.up is not None
    assert layer.down is not None and layer.up is not None
    assert packed.down.nbytes == 128 * 32 // 2 and packed.up.nbytes == 32 * 64 // 2
    assert np.array_equal(layout.unpack_down4(packed.down, 100), layer.down)
    expected = np.where(layer.up_scale != 0, layer.up, 0)
    assert np.array_equal(layout.unpack_up4(packed.up)[:, :40], expected)


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


@pytest.mark.parametrize(("act_bits", "zeros"), [(8, False), (6, False), (0, True)])
def test_one_value_beyond_3_bits_makes_4_of_all(act_bits: int, zeros: bool) -> None:
    mode = Mode("w3", act_bits=act_bits, zeros=zeros, group_size=64, weight_bits=3, experts=0, rank_shared=0)
    layer = random_layer(mode, 128, 40)
    assert weight_bits(layer, "f16") == pack(layer, "f16").weight_bits == 3
    assert weight_bits(layer, "bf16") == pack(layer, "bf16").weight_bits == 4
    for name in ("qweight", "zeros") if zeros else ("qweight",):
        for beyond in (-5, 4):
            values = getattr(layer, name).copy()
            values[1, 7] = beyond
            assert pack(replace(layer, **{name: values}), "f16").weight_bits == 4


def test_integer_activations_with_zero_points_keep_4_bits() -> None:
    layer = random_layer(Mode("w3", zeros=True, weight_bits=3, experts=0, rank_shared=0), 128, 40)
    assert weight_bits(layer, "f16") == 4


def test_bytes_are_not_padded_beyond_the_tile() -> None:
    packed = pack(random_layer(Mode("w4a8", experts=0, rank_shared=0), 1536, 1536), "f16")
    assert packed.weight.nbytes == 1536 * 1536 // 2
    packed = pack(random_layer(Mode("w3a8", experts=0, rank_shared=0, weight_bits=3), 1536, 1536), "f16")
    assert packed.weight.nbytes == 1536 * 1536 * 3 // 8


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
