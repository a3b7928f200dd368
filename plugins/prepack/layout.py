"""Orders of bytes that the kernels read, each with its inverse.

All three follow the fragment maps of the tensor cores ("Matrix Fragments for mma", PTX ISA), so that a lane of a warp
reads what it needs with one or two 16-byte loads and no shuffles. K is padded to 128 rows, N to 32 columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 128  # rows of K in one weight tile
BLOCK = 32  # columns whose weights, scales and zero points lie together; N is padded to it
TURN = 3  # bits by which words of codes with zero points are turned left, for int8 activations
LANES = 32

_LANE = np.arange(LANES)
_GROUP, _PAIR = _LANE // 4, _LANE % 4


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`.

    Example:
        >>> round_up(100, 32), round_up(96, 32)
        (128, 96)
    """
    return -(-value // step) * step


def pad_to(array: NDArray[Any], shape: tuple[int, ...], fill: float = 0) -> NDArray[Any]:
    """The array with `fill` appended until it has this shape.

    Example:
        >>> pad_to(np.ones((1, 2)), (2, 3))
        array([[1., 1., 0.],
               [0., 0., 0.]])
    """
    return np.pad(
        array, [(0, want - have) for have, want in zip(array.shape, shape, strict=True)], constant_values=fill
    )


def _nibble_rows(sixteen_bit: bool) -> NDArray[np.int64]:
    """Row of the 128-row chunk of every nibble, ``[lane, word, nibble]`` (nibble 0 is the lowest).

    int8 activations: word c, byte b holds row ``16c + 4*pair + b`` in its low nibble and that row + 64 in its high one.
    16-bit activations: word c covers rows 32c to 32c+31; nibbles i and i+4 become the two halves of one register.
    """
    rows = np.zeros((LANES, 4, 8), np.int64)
    for word in range(4):
        for nibble in range(8):
            if sixteen_bit:
                step, register, half = (nibble % 4) // 2, nibble % 2, nibble // 4
                rows[:, word, nibble] = 32 * word + 16 * step + 8 * register + 2 * _PAIR + half
            else:
                byte, high = nibble // 2, nibble % 2
                rows[:, word, nibble] = 16 * word + 4 * _PAIR + byte + 64 * high
    return rows


def turn_words(packed: NDArray[np.uint8], left: int) -> NDArray[np.uint8]:
    """Every 32-bit word rotated left by this many bits.

    Example:
        >>> word = np.array([0x80, 0, 0, 0], np.uint8)  # little-endian 0x80
        >>> turn_words(word, 1)
        array([0, 1, 0, 0], dtype=uint8)
    """
    words = np.ascontiguousarray(packed).view(np.uint32)
    left %= 32
    turned = words if left == 0 else (words << np.uint32(left)) | (words >> np.uint32(32 - left))
    return np.ascontiguousarray(turned).view(np.uint8)


def pack_weight(nibbles: NDArray[np.uint8], sixteen_bit: bool) -> NDArray[np.uint8]:
    """Pack ``[Kp, Np]`` nibbles (0 to 15) to bytes ``[Np/32, Kp/128, 4 tiles, 32 lanes, 16]``.

    Example:
        >>> codes = np.arange(128 * 32).reshape(128, 32) % 16
        >>> packed = pack_weight(codes.astype(np.uint8), sixteen_bit=False)
        >>> packed.shape
        (1, 1, 4, 32, 16)
    """
    kp, np_ = nibbles.shape
    tiles = nibbles.reshape(kp // CHUNK, CHUNK, np_ // BLOCK, 4, 8).transpose(2, 0, 3, 1, 4)
    rows = _nibble_rows(sixteen_bit).reshape(LANES, 32)
    lanes = tiles[:, :, :, rows, _GROUP[:, None]]  # [block, chunk, tile, lane, nibble]
    return np.ascontiguousarray(lanes[..., 0::2] | (lanes[..., 1::2] << 4)).astype(np.uint8)


def unpack_weight(packed: NDArray[np.uint8], sixteen_bit: bool) -> NDArray[np.uint8]:
    """Inverse of `pack_weight`.

    Example:
        >>> codes = (np.arange(128 * 32).reshape(128, 32) % 16).astype(np.uint8)
        >>> bool((unpack_weight(pack_weight(codes, True), True) == codes).all())
        True
    """
    blocks, chunks = packed.shape[:2]
    lanes = np.empty((blocks, chunks, 4, LANES, 32), np.uint8)
    lanes[..., 0::2], lanes[..., 1::2] = packed & 15, packed >> 4
    tiles = np.empty((blocks, chunks, 4, CHUNK, 8), np.uint8)
    rows = _nibble_rows(sixteen_bit).reshape(LANES, 32)
    tiles[:, :, :, rows, _GROUP[:, None]] = lanes
    return np.ascontiguousarray(tiles.transpose(1, 3, 0, 2, 4)).reshape(chunks * CHUNK, blocks * BLOCK)


# 3-bit weights. A code is a run of bits, or pieces of one: (word, its bit in the word, its bit in the code, how many).
# A byte (int8 activations) has two codes and two spare bits, a half word (16-bit ones) five codes and one spare bit:
# the spare bits of a lane's three words make up the codes that are left.
Piece = tuple[int, int, int, int]


def _int8_pieces(register: int, byte: int) -> list[Piece]:
    """Where a code of a register (of 8) and a byte of it lies: at the top of a byte, below that, or in spare bits."""
    if register < 6:
        return [(register // 2, 8 * byte + (2 if register % 2 else 5), 0, 3)]
    if register == 6:
        return [(0, 8 * byte, 1, 2), (1, 8 * byte + 1, 0, 1)]
    return [(1, 8 * byte, 2, 1), (2, 8 * byte, 0, 2)]


def _sixteen_bit_pieces(register: int, half: int) -> list[Piece]:
    """The same of a register (of 16) and one of its halves: from bit 0, 3, 6, 10 or 13 on, or in the spare bits 9."""
    if register < 15:
        return [(register // 5, 16 * half + (0, 3, 6, 10, 13)[register % 5], 0, 3)]
    return [(word, 16 * half + 9, word, 1) for word in range(3)]


def _three_bit_order(sixteen_bit: bool) -> tuple[NDArray[np.int64], list[list[Piece]]]:
    """Row of the chunk ``[lane, code]`` and the pieces of every one of a lane's 32 codes of a column."""
    code = np.arange(32)
    if sixteen_bit:  # registers of two rows
        rows = 8 * (code // 2) + code % 2 + 2 * _PAIR[:, None]
        return rows, [_sixteen_bit_pieces(i // 2, i % 2) for i in range(32)]
    return 16 * (code // 4) + code % 4 + 4 * _PAIR[:, None], [_int8_pieces(i // 4, i % 4) for i in range(32)]


def pack_weight3(codes: NDArray[np.uint8], sixteen_bit: bool) -> NDArray[np.uint8]:
    """Pack ``[Kp, Np]`` codes (0 to 7) to bytes ``[Np/32, Kp/128, 3 words, 32 lanes, 16]``; a lane's 16 are 4 tiles.

    Example:
        >>> codes = (np.arange(128 * 32).reshape(128, 32) % 8).astype(np.uint8)
        >>> pack_weight3(codes, sixteen_bit=False).shape
        (1, 1, 3, 32, 16)
    """
    kp, np_ = codes.shape
    tiles = codes.reshape(kp // CHUNK, CHUNK, np_ // BLOCK, 4, 8).transpose(2, 0, 3, 1, 4)
    rows, pieces = _three_bit_order(sixteen_bit)
    words = np.zeros((np_ // BLOCK, kp // CHUNK, 3, LANES, 4), np.uint32)
    for i, parts in enumerate(pieces):
        lanes = tiles[:, :, :, rows[:, i], _GROUP].astype(np.uint32).transpose(0, 1, 3, 2)  # [block, chunk, lane, tile]
        for word, bit, first, count in parts:
            words[:, :, word] |= (lanes >> np.uint32(first) & np.uint32((1 << count) - 1)) << np.uint32(bit)
    return words.view(np.uint8)


def unpack_weight3(packed: NDArray[np.uint8], sixteen_bit: bool) -> NDArray[np.uint8]:
    """Inverse of `pack_weight3`.

    Example:
        >>> codes = (np.arange(128 * 32).reshape(128, 32) % 8).astype(np.uint8)
        >>> bool((unpack_weight3(pack_weight3(codes, True), True) == codes).all())
        True
    """
    blocks, chunks = packed.shape[:2]
    words = np.ascontiguousarray(packed).view(np.uint32)
    rows, pieces = _three_bit_order(sixteen_bit)
    tiles = np.empty((blocks, chunks, 4, CHUNK, 8), np.uint8)
    for i, parts in enumerate(pieces):
        lanes = np.zeros((blocks, chunks, LANES, 4), np.uint32)
        for word, bit, first, count in parts:
            lanes |= (words[:, :, word] >> np.uint32(bit) & np.uint32((1 << count) - 1)) << np.uint32(first)
        tiles[:, :, :, rows[:, i], _GROUP] = lanes.transpose(0, 1, 3, 2)
    return np.ascontiguousarray(tiles.transpose(1, 3, 0, 2, 4)).reshape(chunks * CHUNK, blocks * BLOCK)


def pack_groups(values: NDArray[Any]) -> NDArray[Any]:
    """Pack ``[groups, Np]`` scales or zero points to ``[Np/32, groups, 8, 4]``: columns 8 apart side by side.

    A lane of the decode kernel reads its four columns at once, a lane of the GEMM the eight of its accumulators.

    Example:
        >>> pack_groups(np.arange(32).reshape(1, 32))[0, 0, :2]
        array([[ 0,  8, 16, 24],
               [ 1,  9, 17, 25]])
    """
    groups, np_ = values.shape
    return np.ascontiguousarray(values.reshape(groups, np_ // BLOCK, 4, 8).transpose(1, 0, 3, 2))


def unpack_groups(packed: NDArray[Any]) -> NDArray[Any]:
    """Inverse of `pack_groups`.

    Example:
        >>> values = np.arange(128).reshape(2, 64)
        >>> bool((unpack_groups(pack_groups(values)) == values).all())
        True
    """
    blocks, groups = packed.shape[:2]
    return np.ascontiguousarray(packed.transpose(1, 0, 3, 2)).reshape(groups, blocks * BLOCK)


def _down_index() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row (of 32) and column (of 16) of value v of a lane: v = 8*step + 2*register + half."""
    value = np.arange(16)
    step, register, half = value // 8, (value % 8) // 2, value % 2
    row = 8 * _PAIR[:, None] + 4 * step + 2 * (register // 2) + half
    column = _GROUP[:, None] + 8 * (register % 2)
    return row, np.broadcast_to(column, row.shape)


def pack_down(down: NDArray[Any]) -> NDArray[Any]:
    """Pack ``[K, 16 * tiles]`` to ``[tiles, K/32, 2 steps, 32 lanes, 8]``; int8 keeps a lane's 16 values together.

    K is padded to a multiple of 32 with zeros. A lane owns 8 consecutive rows, so that it reads 16 bytes of x at once.

    Example:
        >>> pack_down(np.zeros((100, 16), np.uint16)).shape, pack_down(np.zeros((100, 16), np.int8)).shape
        ((1, 4, 2, 32, 8), (1, 4, 32, 16))
    """
    padded = pad_to(down, (round_up(down.shape[0], 32), down.shape[1]))
    blocks, tiles = padded.shape[0] // 32, padded.shape[1] // 16
    row, column = _down_index()
    cut = padded.reshape(blocks, 32, tiles, 16).transpose(2, 0, 1, 3)
    lanes = cut[:, :, row, column]  # [tile, block, lane, 16]
    if down.dtype == np.int8:
        return np.ascontiguousarray(lanes)
    return np.ascontiguousarray(lanes.reshape(tiles, blocks, LANES, 2, 8).transpose(0, 1, 3, 2, 4))


def unpack_down(packed: NDArray[Any], in_features: int) -> NDArray[Any]:
    """Inverse of `pack_down`.

    Example:
        >>> down = np.arange(64 * 16, dtype=np.uint16).reshape(64, 16)
        >>> bool((unpack_down(pack_down(down), in_features=64) == down).all())
        True
    """
    lanes = packed
    if packed.dtype != np.int8:
        lanes = packed.transpose(0, 1, 3, 2, 4).reshape(*packed.shape[:2], LANES, 16)
    row, column = _down_index()
    cut = np.empty((*lanes.shape[:2], 32, 16), packed.dtype)
    cut[:, :, row, column] = lanes
    tiles, blocks = cut.shape[:2]
    return np.ascontiguousarray(cut.transpose(1, 2, 0, 3).reshape(blocks * 32, tiles * 16)[:in_features])


def pack_codes(lanes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack ``[..., 8 * words]`` values of INT4 to ``[..., 4 * words]`` bytes; every value is stored with 8 added.

    A word has the values of four registers: nibbles i and i + 4 become the two halves of register i.

    Example:
        >>> [hex(byte) for byte in pack_codes(np.array([0, 1, 2, 3, 4, 5, 6, 7], np.int8))]
        ['0xa8', '0xec', '0xb9', '0xfd']
    """
    registers = lanes.reshape(*lanes.shape[:-1], -1, 4, 2)
    nibbles = (registers.swapaxes(-1, -2).reshape(lanes.shape) + 8).astype(np.uint8)
    return np.ascontiguousarray(nibbles[..., 0::2] | nibbles[..., 1::2] << 4)


def unpack_codes(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Inverse of `pack_codes`.

    Example:
        >>> unpack_codes(pack_codes(np.arange(-4, 4, dtype=np.int8)))
        array([-4, -3, -2, -1,  0,  1,  2,  3], dtype=int8)
    """
    halves = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1, 2, 4)
    values = halves.swapaxes(-1, -2).reshape(*packed.shape[:-1], 2 * packed.shape[-1])
    return np.asarray(values.astype(np.int8) - np.int8(8))


def pack_down4(down: NDArray[np.int8]) -> NDArray[np.uint8]:
    """`pack_down` of values of INT4: ``[tiles, K/32, 32 lanes, 8]``.

    Example:
        >>> pack_down4(np.zeros((128, 16), np.int8)).shape
        (1, 4, 32, 8)
    """
    return pack_codes(pack_down(down))


def unpack_down4(packed: NDArray[np.uint8], in_features: int) -> NDArray[np.int8]:
    """Inverse of `pack_down4`.

    Example:
        >>> down = (np.arange(64 * 16).reshape(64, 16) % 16 - 8).astype(np.int8)
        >>> bool((unpack_down4(pack_down4(down), in_features=64) == down).all())
        True
    """
    return unpack_down(unpack_codes(packed), in_features)


def _up_rows() -> NDArray[np.int64]:
    """Rank (of 16) of value v of a lane: v = 2*register + half."""
    value = np.arange(4)
    return np.asarray(2 * _PAIR[:, None] + 8 * (value // 2) + value % 2)


def pack_up(up: NDArray[Any]) -> NDArray[Any]:
    """Pack ``[16 * tiles, Np]`` to ``[tiles, Np/8, 32 lanes, 4]``.

    Example:
        >>> pack_up(np.zeros((32, 64), np.uint16)).shape
        (2, 8, 32, 4)
    """
    tiles, columns = up.shape[0] // 16, up.shape[1] // 8
    cut = up.reshape(tiles, 16, columns, 8).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(cut[:, :, _up_rows(), _GROUP[:, None]])


def unpack_up(packed: NDArray[Any]) -> NDArray[Any]:
    """Inverse of `pack_up`.

    Example:
        >>> up = np.arange(16 * 32, dtype=np.uint16).reshape(16, 32)
        >>> bool((unpack_up(pack_up(up)) == up).all())
        True
    """
    tiles, columns = packed.shape[:2]
    cut = np.empty((tiles, columns, 16, 8), packed.dtype)
    cut[:, :, _up_rows(), _GROUP[:, None]] = packed
    return np.ascontiguousarray(cut.transpose(0, 2, 1, 3)).reshape(tiles * 16, columns * 8)


def pack_up4(up: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Pack ``[16 * tiles, Np]`` values of INT4 to ``[tiles, Np/16, 32 lanes, 4]``: two tiles of `pack_up` together.

    Example:
        >>> pack_up4(np.zeros((32, 64), np.int8)).shape
        (2, 4, 32, 4)
    """
    lanes = pack_up(up)
    tiles, columns = lanes.shape[:2]
    return pack_codes(lanes.reshape(tiles, columns // 2, 2, LANES, 4).swapaxes(2, 3).reshape(tiles, -1, LANES, 8))


def unpack_up4(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Inverse of `pack_up4`.

    Example:
        >>> up = (np.arange(16 * 32).reshape(16, 32) % 16 - 8).astype(np.int8)
        >>> bool((unpack_up4(pack_up4(up)) == up).all())
        True
    """
    tiles, pairs = packed.shape[:2]
    lanes = unpack_codes(packed).reshape(tiles, pairs, LANES, 2, 4).swapaxes(2, 3)
    return unpack_up(lanes.reshape(tiles, pairs * 2, LANES, 4))
