"""A token embedding with a row of INT8 codes and one scale for every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 1 << 14  # tokens of the vocabulary that are rounded at a time


class QuantizedEmbedding(nn.Module):
    """Rows of `codes * scales`, and as the embedding that it stands for, times `embed_scale` if that has one.

    Args:
        codes: `[vocabulary, width]` int8, between -127 and 127.
        scales: `[vocabulary]` in the model's own type.
        embed_scale: What a family multiplies its rows by (Gemma); None for nothing.

    Example:
        >>> table = nn.Embedding.from_pretrained(torch.tensor([[127.0, -1.4], [0.0, 0.0], [0.5, 0.25]]))
        >>> QuantizedEmbedding.of(table)(torch.tensor([2, 0]))
        tensor([[  0.5000,   0.2520],
                [127.0000,  -1.0000]])
    """

    codes: Tensor
    scales: Tensor
    embed_scale: Tensor | None

    def __init__(self, codes: Tensor, scales: Tensor, embed_scale: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("embed_scale", embed_scale, persistent=False)  # the configuration has it

    @classmethod
    def of(cls, embedding: nn.Module) -> QuantizedEmbedding:
        """Round every row of an embedding to the nearest codes, its largest magnitude being 127."""
        weight = embedding.get_parameter("weight").detach()
        codes = torch.empty(weight.shape, dtype=torch.int8)
        scales = (weight.abs().amax(1).float() / 127).to(weight.dtype)
        divisor = torch.where(scales > 0, scales, torch.ones_like(scales)).float()
        for start in range(0, len(weight), ROWS):
            part = slice(start, start + ROWS)
            codes[part] = torch.round(weight[part].float() / divisor[part, None]).clamp_(-127, 127)
        return cls(codes, scales, getattr(embedding, "embed_scale", None))

    @classmethod
    def like(cls, embedding: nn.Module) -> QuantizedEmbedding:
        """One of the same size without numbers, for `load_state_dict`."""
        weight = embedding.get_parameter("weight")
        codes = torch.empty(weight.shape, dtype=torch.int8, device="meta")
        scales = torch.empty(len(weight), dtype=weight.dtype, device="meta")
        return cls(codes, scales, getattr(embedding, "embed_scale", None))

    def decode(self, rows: slice = slice(None)) -> Tensor:
        """Some rows of the table without `embed_scale`, in the type of `scales`."""
        return self.codes[rows].to(self.scales.dtype) * self.scales[rows, None]

    def forward(self, token_ids: Tensor) -> Tensor:
        """Rows `[..., width]` of integer `token_ids` `[...]`, in the type of `scales`."""
        rows = self.codes[token_ids].to(self.scales.dtype) * self.scales[token_ids].unsqueeze(-1)
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{len(self.codes)}, {self.codes.shape[1]}, bits=8"
