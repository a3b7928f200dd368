"""Layers as llama.cpp's blocks of 32 weights: Q4_0 and Q8_0, a float16 scale in front of the codes."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
Q4_BYTES, Q8_BYTES = 18, 34  # of a block


def q4_0(values: Tensor, scales: Tensor) -> Tensor:
    """Blocks of 4-bit codes: byte j holds the codes of weights j (low) and j + 16 of its block.

    Args:
        values: int8 `[out, in]`, from -8 to 7: a weight is its value times its scale.
        scales: float16 `[out, groups]`; a group is a multiple of 32 input channels.

    Returns:
        uint8 `[out, in / 32 * 18]`.

    Example:
        >>> q4_0(torch.zeros(1, 32, dtype=torch.int8), torch.ones(1, 1, dtype=torch.float16))[0, :4].tolist()
        [0, 60, 136, 136]
    """
    blocks = (values + 8).view(torch.uint8).reshape(len(values), -1, BLOCK)
    codes = blocks[..., : BLOCK // 2] | (blocks[..., BLOCK // 2 :] << 4)
    return torch.cat([_scale_bytes(scales, blocks.shape[1]), codes], dim=-1).reshape(len(values), -1)


def q8_0(values: Tensor, scales: Tensor) -> Tensor:
    """Blocks of 8-bit codes.

    Args:
        values: int8 `[out, in]`: a weight is its value times its scale.
        scales: float16 `[out, groups]`; a group is a multiple of 32 input channels.

    Returns:
        uint8 `[out, in / 32 * 34]`.

    Example:
        >>> q8_0(torch.ones(1, 32, dtype=torch.int8), torch.ones(1, 1, dtype=torch.float16))[0, :4].tolist()
        [0, 60, 1, 1]
    """
    blocks = values.view(torch.uint8).reshape(len(values), -1, BLOCK)
    return torch.cat([_scale_bytes(scales, blocks.shape[1]), blocks], dim=-1).reshape(len(values), -1)


def _scale_bytes(scales: Tensor, blocks: int) -> Tensor:
    """The scale of every block, uint8 `[out, blocks, 2]`."""
    spread = scales.repeat_interleave(blocks // scales.shape[1], dim=1).contiguous()
    return spread.view(torch.uint8).reshape(len(scales), blocks, 2)
