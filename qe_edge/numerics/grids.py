"""Number grids: how a real value becomes an integer code and back (docs/method.md, section 3).

Everything that quantizes, decodes, packs or exports goes through this module, so that PyTorch, ONNX and the
kernels agree bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qe_edge.system.errors import NumericalError, RecipeError

MIN_RANGE = 1e-5  # smallest range a scale may stand for, so that all-zero rows decode to exactly zero
SCALE_DTYPE = torch.float16
PER_CHANNEL = -1


@dataclass(frozen=True)
class WeightGrid:
    """Integer grid of a weight matrix.

    Attributes:
        bits: Width of a code, 2 to 4.
        group_size: Neighbouring input channels that share a scale; -1 is one scale per output channel.
        symmetric: True for codes in [-2^(b-1), 2^(b-1)-1] without zero point, False for a zero point per group.

    Example:
        >>> grid = WeightGrid(bits=4, group_size=128)
        >>> grid.limits, grid.resolve_group(4096), grid.resolve_group(1000)
        ((-8, 7), 128, -1)
    """

    bits: int
    group_size: int = PER_CHANNEL
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise RecipeError(f"Weights of {self.bits} bits are not supported.", "Choose 2, 3 or 4 bits.")
        if self.group_size != PER_CHANNEL and self.group_size < 16:
            raise RecipeError(f"Group size {self.group_size} is too small.", "Choose -1 (per channel) or at least 16.")

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest code; signed, whether there is a zero point or not."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def resolve_group(self, in_features: int) -> int:
        """Group size that divides `in_features`: the largest power of two up to the wanted one, never padding.

        Powers of two are what ONNX Runtime's and our kernels can fuse. Where not even 16 divides, one scale serves
        the whole output channel.
        """
        if self.group_size == PER_CHANNEL:
            return PER_CHANNEL
        group = 1 << (self.group_size.bit_length() - 1)
        while group >= 16:
            if in_features % group == 0:
                return group
            group //= 2
        return PER_CHANNEL


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix on its grid, `decoded = (codes - zeros) * scales`.

    Attributes:
        codes: `[out, in]` int8, values in [-8, 7].
        scales: `[out, groups]` float16.
        zeros: `[out, groups]` int8 in [-8, 7], or None for a symmetric grid.
        bits: Width of a code.
        group_size: Input channels per scale, -1 for one group.

    Example:
        >>> weight = quantize_weight(torch.tensor([[0.1, -0.7, 0.35]]), WeightGrid(bits=4))
        >>> weight.codes.tolist(), weight.scales.tolist()
        ([[1, -7, 4]], [[0.0999755859375]])
        >>> weight.decode()
        tensor([[ 0.1000, -0.6998,  0.3999]])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int

    @property
    def out_features(self) -> int:
        """Number of output channels."""
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        """Number of input channels."""
        return self.codes.shape[1]

    def decode(self) -> Tensor:
        """The weight `[out, in]` in float32 that the integer GEMM computes with."""
        return decode_weight(self.codes, self.scales, self.zeros)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The output channels `start:stop`; exact, because no scale spans two output channels."""
        zeros = None if self.zeros is None else self.zeros[start:stop].clone()
        return QuantizedWeight(
            self.codes[start:stop].clone(), self.scales[start:stop].clone(), zeros, self.bits, self.group_size
        )


def decode_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Decode integer codes `[out, in]` with `[out, groups]` scales and zeros to float32 `[out, in]`.

    Example:
        >>> codes = torch.tensor([[1, -2, 3, 4]], dtype=torch.int8)
        >>> scales = torch.tensor([[0.5, 2.0]], dtype=torch.float16)  # two groups of two weights
        >>> zeros = torch.tensor([[0, 1]], dtype=torch.int8)
        >>> decode_weight(codes, scales, zeros)
        tensor([[ 0.5000, -1.0000,  4.0000,  6.0000]])
    """
    out_features, in_features = codes.shape
    grouped = codes.to(torch.float32, copy=True).reshape(out_features, scales.shape[1], -1)
    if zeros is not None:
        grouped -= zeros.float().unsqueeze(-1)
    return grouped.mul_(scales.float().unsqueeze(-1)).reshape(out_features, in_features)


def quantize_weight(weight: Tensor, grid: WeightGrid) -> QuantizedWeight:
    """Round a weight matrix to the nearest codes of `grid`.

    Scales are rounded to float16 first and the codes are chosen for the rounded scales, so what is stored is what was
    optimised. Half-way cases go to even. A zero entry decodes to exactly zero on either kind of grid, since the
    range of an asymmetric group always includes zero.

    Args:
        weight: `[out, in]`, any float dtype.
        grid: Bits, group size and symmetry.

    Raises:
        NumericalError: If the weight holds NaN or infinity.

    Example:
        >>> weight = torch.tensor([[-0.7, 0.0, 0.34, 0.7], [-7.0, 0.0, 3.4, 7.0]])
        >>> quantized = quantize_weight(weight, WeightGrid(bits=4))
        >>> quantized.codes
        tensor([[-7,  0,  3,  7],
                [-7,  0,  3,  7]], dtype=torch.int8)
        >>> quantized.decode()[1]
        tensor([-7.,  0.,  3.,  7.])
    """
    w = weight.float()
    groups = split_groups(w, grid)
    smallest, largest = groups.amin(-1), groups.amax(-1)  # both hand NaN on
    if not (torch.isfinite(smallest) & torch.isfinite(largest)).all():
        raise NumericalError(
            "A weight matrix holds NaN or infinity.", "Check the checkpoint; it cannot be quantized as it is."
        )
    scales, zeros = scales_of_range(smallest, largest, grid)
    return round_on_grid(w, scales, zeros, grid)


def split_groups(weight: Tensor, grid: WeightGrid) -> Tensor:
    """A weight `[out, in]` as `[out, groups, width]`, the weights of one scale together.

    Example:
        >>> tuple(split_groups(torch.zeros(8, 256), WeightGrid(4, group_size=64)).shape)
        (8, 4, 64)
    """
    out_features, in_features = weight.shape
    group = grid.resolve_group(in_features)
    return weight.reshape(out_features, -1, in_features if group == PER_CHANNEL else group)


def scales_of_range(smallest: Tensor, largest: Tensor, grid: WeightGrid) -> tuple[Tensor, Tensor | None]:
    """Scales float16 and zero points int8 (None on a symmetric grid) that cover ranges of weights.

    Args:
        smallest: Lower end of every range, any shape; an asymmetric one is extended to include zero.
        largest: Upper end.
        grid: Bits and symmetry.

    Example:
        >>> smallest, largest = torch.tensor([[-1.0]]), torch.tensor([[6.5]])
        >>> scales, zeros = scales_of_range(smallest, largest, WeightGrid(4, symmetric=False))
        >>> scales.tolist(), zeros.tolist()
        ([[0.5]], [[-6]])
    """
    low, high = grid.limits
    if grid.symmetric:
        return _storable(torch.maximum(-smallest, largest).clamp_min(MIN_RANGE) / high), None
    smallest, largest = smallest.clamp_max(0.0), largest.clamp_min(0.0)
    scales = _storable((largest - smallest).clamp_min(MIN_RANGE) / (high - low))
    # codes and zero points are shifted by `low` to signed numbers; the shift cancels in decoding
    return scales, (torch.round(-smallest / scales.float()).clamp_(0, high - low) + low).to(torch.int8)


def round_on_grid(weight: Tensor, scales: Tensor, zeros: Tensor | None, grid: WeightGrid) -> QuantizedWeight:
    """The nearest codes of a weight `[out, in]` float32 on given scales and zero points `[out, groups]`.

    Example:
        >>> weight = torch.tensor([[0.24, 0.26, 9.0]])
        >>> scales = torch.tensor([[0.5]], dtype=torch.float16)
        >>> round_on_grid(weight, scales, None, WeightGrid(4)).codes.tolist()
        [[0, 1, 7]]
    """
    low, high = grid.limits
    codes = torch.round(split_groups(weight, grid) / scales.float().unsqueeze(-1))
    if zeros is not None:
        codes += zeros.float().unsqueeze(-1)
    codes = codes.clamp_(low, high).to(torch.int8).reshape(weight.shape)
    return QuantizedWeight(codes, scales, zeros, grid.bits, grid.resolve_group(weight.shape[1]))


def _storable(scales: Tensor) -> Tensor:
    """Scales as they are stored; a range beyond float16 saturates instead of becoming infinite."""
    return scales.clamp_max(torch.finfo(SCALE_DTYPE).max).to(SCALE_DTYPE)


def rounds_activations(bits: int) -> bool:
    """Whether activations of this width are rounded; 0, and 16 and more, mean that they are not.

    Example:
        >>> rounds_activations(8), rounds_activations(0), rounds_activations(16)
        (True, False, False)
    """
    return 0 < bits < 16


def fake_quantize_activation(x: Tensor, bits: int) -> Tensor:
    """Per-token symmetric dynamic quantization of `x` `[..., features]`, returned on the real axis.

    `bits` of 0 (or 16 and more) means no quantization and returns `x` unchanged.

    Example:
        >>> x = torch.tensor([[127.0, 0.4, -63.6], [1.0, 0.0, 0.0]])
        >>> fake_quantize_activation(x, bits=8)
        tensor([[127.,   0., -64.],
                [  1.,   0.,   0.]])
    """
    if not rounds_activations(bits):
        return x
    largest = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(MIN_RANGE) / largest
    quantized: Tensor = torch.round(x / scale).clamp_(-largest - 1, largest) * scale
    return quantized


def quantize_int8(matrix: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of a factor matrix with one float16 scale per index of `dim`.

    Returns:
        Codes int8 of the matrix's shape, and scales float16 `[matrix.shape[dim]]`. An all-zero slice has scale 0.

    Example:
        >>> factor = torch.tensor([[127.0, -1.0], [0.0, 0.0]])
        >>> codes, scales = quantize_int8(factor, dim=0)
        >>> codes.tolist(), scales.tolist()
        ([[127, -1], [0, 0]], [1.0, 0.0])
    """
    other = 1 - dim
    scales = (matrix.float().abs().amax(other) / 127).to(SCALE_DTYPE)
    divisor = torch.where(scales > 0, scales.float(), torch.ones_like(scales, dtype=torch.float32)).unsqueeze(other)
    codes = torch.round(matrix.float() / divisor).clamp_(-127, 127) * (scales > 0).unsqueeze(other)
    return codes.to(torch.int8), scales


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` codes, packed.

    Example:
        >>> packed_width(4096, bits=4), packed_width(10, bits=3)
        (2048, 4)
    """
    return -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack signed int8 codes `[rows, columns]` of 2 to 4 bits to uint8 `[rows, packed_width]`, low bits first.

    A row is one little-endian stream of bits; for 4 bits that is `pack_int4`.

    Example:
        >>> packed = pack_codes(torch.tensor([[1, -2, 0, 1]], dtype=torch.int8), bits=2)
        >>> [f"{byte:08b}" for byte in packed[0].tolist()]
        ['01001001']
    """
    if bits == 4:
        return pack_int4(codes)
    columns = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, -columns % 8)).reshape(len(codes), -1, 8)
    words = torch.zeros(padded.shape[:2], dtype=torch.int32, device=codes.device)
    for place in range(8):
        words |= (padded[:, :, place].int() & (2**bits - 1)) << (bits * place)
    parts = torch.stack([(words >> (8 * part)).to(torch.uint8) for part in range(bits)], dim=-1)
    return parts.reshape(len(codes), -1)[:, : packed_width(columns, bits)].contiguous()


def unpack_codes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Inverse of `pack_codes`: int8 `[rows, columns]`.

    Example:
        >>> codes = torch.tensor([[3, -4, 0, 1, -1]], dtype=torch.int8)
        >>> unpack_codes(pack_codes(codes, bits=3), columns=5, bits=3).tolist()
        [[3, -4, 0, 1, -1]]
    """
    if bits == 4:
        return unpack_int4(packed, columns)
    parts = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).reshape(len(packed), -1, bits)
    words = torch.zeros(parts.shape[:2], dtype=torch.int32, device=packed.device)
    for part in range(bits):
        words |= parts[:, :, part].int() << (8 * part)
    codes = torch.empty((*words.shape, 8), dtype=torch.int8, device=packed.device)
    for place in range(8):  # the shift to the left puts the code's sign where the shift to the right keeps it
        codes[:, :, place] = words << (32 - bits * (place + 1)) >> (32 - bits)
    return codes.reshape(len(packed), -1)[:, :columns].contiguous()


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes in [-8, 7] of shape `[rows, columns]` to uint8 `[rows, ceil(columns/2)]`, low nibble first.

    Example:
        >>> [hex(byte) for byte in pack_int4(torch.tensor([[1, 2, -8]], dtype=torch.int8))[0].tolist()]
        ['0x21', '0x8']
    """
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    nibbles = codes.to(torch.uint8) & 0xF
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_int4`: uint8 `[rows, ceil(columns/2)]` to int8 `[rows, columns]`.

    Example:
        >>> unpack_int4(torch.tensor([[0x21, 0x08]], dtype=torch.uint8), columns=3).tolist()
        [[1, 2, -8]]
    """
    low = (packed << 4).view(torch.int8) >> 4
    high = packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).reshape(packed.shape[0], -1)[:, :columns].contiguous()
