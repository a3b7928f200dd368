"""Codebooks that are not integers times a scale: E8P lattice points (QuIP#), sums of binary matrices (QBB), and values.

All are stored as codes of b bits a weight, as integers are, so the rest of a layer stays the same:

- "e8p": eight neighbouring codes of 2 bits are one index of 16 bits, the first code lowest; 4 bits are two such
  indices, the coarse one in the lower halves, and the fine one's points count `FINE` as much;
- "binary": bit k of a code is the sign of the k-th binary matrix, which has a scale of its own;
- "levels": a code is the number of one of the `2^b` values of its output channel and group, which lie side by side.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

Codebook = Literal["integers", "e8p", "binary", "levels"]
BLOCK = 8  # weights of one lattice point
FINE = 1 / 3.45  # scale of the second point, relative to the first (QuIP#, 4 bits)


@lru_cache(maxsize=1)
def e8p_magnitudes() -> Tensor:
    """The 256 magnitudes `[256, 8]` of E8P, half-integers: 227 of squared norm up to 10, and 29 of 12.

    QuIP# lists its own 29; these are the first in lexicographic order of the places of three halves.

    Example:
        >>> magnitudes = e8p_magnitudes()
        >>> tuple(magnitudes.shape), magnitudes[0].tolist()
        ((256, 8), [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    """

    def vector(threes: tuple[int, ...], fives: tuple[int, ...] = ()) -> list[float]:
        return [2.5 if place in fives else 1.5 if place in threes else 0.5 for place in range(BLOCK)]

    found = [vector(threes) for count in range(5) for threes in combinations(range(BLOCK), count)]
    for five in range(BLOCK):
        found += [vector((), (five,)), *(vector((three,), (five,)) for three in range(BLOCK) if three != five)]
    found += [vector(threes) for threes in list(combinations(range(BLOCK), 5))[:29]]
    return torch.tensor(found)


def e8p_points(index: Tensor) -> Tensor:
    """Lattice points `[..., 8]` float32 of indices `[...]`: 8 bits magnitude, 7 bits signs, 1 bit shift by a quarter.

    The sign of the last place makes the sum of the half-integers even.

    Example:
        >>> e8p_points(torch.tensor([0, 1 << 15])).tolist()  # the same point, shifted down and up by a quarter
        [[0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25], [0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75]]
    """
    magnitude = e8p_magnitudes().to(index.device)[index & 255]
    negative = (index.unsqueeze(-1) >> torch.arange(8, 15, device=index.device)) & 1
    last = (negative.sum(-1) + magnitude.sum(-1).long()) & 1
    signs = 1.0 - 2.0 * torch.cat([negative, last.unsqueeze(-1)], -1)
    return magnitude * signs + (((index >> 15) & 1).unsqueeze(-1) * 2 - 1) * 0.25


def nearest_e8p(vectors: Tensor) -> Tensor:
    """Indices `[n]` int64 of the lattice points nearest to `[n, 8]` float32.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> vectors = torch.randn(1000, 8)
        >>> points = e8p_points(nearest_e8p(vectors))
        >>> round(float((points - vectors).square().mean()), 2)  # of a variance of 1, with 2 bits a weight
        0.09
    """
    magnitudes = e8p_magnitudes().to(vectors.device)
    odd, half = magnitudes.sum(1).long() & 1, magnitudes.square().sum(1) / 2
    found, best = [], []
    for shift in (0, 1):
        moved = vectors - (shift * 2 - 1) * 0.25
        size, wrong = moved.abs(), (moved < 0).sum(1, keepdim=True) & 1
        products = size.unsqueeze(1) * magnitudes  # `[n, 256, 8]`
        # where the signs of the vector make the sum odd, the place that costs least takes the other one
        least, place = products.min(2)
        flips = wrong != odd
        score = products.sum(2) - half - 2 * least * flips
        chosen = score.argmax(1)
        rows = torch.arange(len(vectors), device=vectors.device)
        negative = moved < 0
        negative[rows, place[rows, chosen]] ^= flips[rows, chosen]
        bits = (negative[:, :7].long() << torch.arange(8, 15, device=vectors.device)).sum(1)
        found.append(chosen | bits | (shift << 15))
        best.append(score[rows, chosen] - moved.square().sum(1) / 2)
    return torch.where(best[0] >= best[1], found[0], found[1])


def e8p_codes(index: Tensor) -> Tensor:
    """Indices `[out, blocks]` as codes of 2 bits, int64 `[out, 8 blocks]` from 0 to 3.

    Example:
        >>> e8p_codes(torch.tensor([[0b11_10_01_00]])).tolist()
        [[0, 1, 2, 3, 0, 0, 0, 0]]
    """
    return ((index.unsqueeze(-1) >> (2 * torch.arange(BLOCK, device=index.device))) & 3).flatten(1)


def decode_codebook(codes: Tensor, scales: Tensor, bits: int, codebook: Codebook) -> Tensor:
    """The weight `[out, in]` float32 that codes stand for.

    Args:
        codes: `[out, in]` int8, signed as they are packed.
        scales: `[out, 1]` float16 of lattice points; of binary matrices `[out, bits]`; values `[out, groups * 2^bits]`.
        bits: Of a code; 2 or 4 of lattice points.
        codebook: Which one.

    Example:
        >>> codes = torch.tensor([[0b00, 0b01, 0b10, 0b11]], dtype=torch.int8)
        >>> scales = torch.tensor([[1.0, 0.25]], dtype=torch.float16)
        >>> decode_codebook(codes, scales, bits=2, codebook="binary").tolist()
        [[-1.25, 0.75, -0.75, 1.25]]
    """
    plain = codes.long() & (2**bits - 1)
    if codebook == "binary":
        signs = ((plain.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1).float() * 2 - 1
        decoded: Tensor = (signs * scales.float().unsqueeze(1)).sum(-1)
        return decoded
    if codebook == "levels":
        values = scales.float().reshape(len(codes), -1, 2**bits)
        return values.gather(2, plain.reshape(len(codes), values.shape[1], -1)).flatten(1)
    parts, places = plain.reshape(len(codes), -1, BLOCK), 2 * torch.arange(BLOCK, device=codes.device)
    points = e8p_points(((parts & 3) << places).sum(-1))
    if bits == 4:
        points = points + FINE * e8p_points(((parts >> 2) << places).sum(-1))
    return points.flatten(1) * scales.float()
