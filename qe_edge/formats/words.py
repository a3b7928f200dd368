"""Codes of 2 to 4 bits in words of 32 bits, as compressed-tensors and GPTQ store them."""

from __future__ import annotations

import torch
from torch import Tensor

from qe_edge.numerics.grids import pack_codes, packed_width

WORD = 4  # bytes


def words_in(columns: int, bits: int) -> int:
    """Words of a row of `columns` codes.

    Example:
        >>> words_in(32, 3), words_in(33, 4)
        (3, 5)
    """
    return -(-packed_width(columns, bits) // WORD)


def packed_words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 `[rows, columns]`, shifted to start from 0, as int32 `[rows, words_in(columns, bits)]`.

    A row is one little-endian stream of bits. A code of 3 bits may lie in two words.

    Example:
        >>> packed_words(torch.tensor([[-8, -7, 7]], dtype=torch.int8), 4)
        tensor([[3856]], dtype=torch.int32)
    """
    stream = pack_codes(codes + (1 << (bits - 1)), bits)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % WORD))
    return stream.reshape(-1).view(torch.int32).reshape(len(codes), -1)
