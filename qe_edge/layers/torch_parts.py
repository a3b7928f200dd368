"""Parts of a quantized layer that PyTorch runs and the operator lacks: bases, codebooks, outliers, modalities, ...

With `x' = x * inv_omega`, `V` and `U` orthogonal, `P` an order of the inputs, `S` sparse and `F` codes of 8 bits:

`y = U^T (W_q Q_a((V P x')_kept) + F Q_8((P x')_fine)) + S x + low-rank correction + b`

Tokens that are recognised as a picture's may have `x * image_inverse` in place of `x'`, and a low-rank correction of
their own. A layer has any of these parts. Everything is stored, so nothing is drawn again when a checkpoint is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from qe_edge.numerics.codebooks import Codebook
from qe_edge.numerics.grids import PER_CHANNEL, fake_quantize_activation, quantize_int8, rounds_activations
from qe_edge.numerics.orthogonal import Rotation

FINE_BITS = 8


@dataclass(frozen=True)
class TorchParts:
    """Parts of a layer that the operator lacks; every tensor may be None.

    Attributes:
        order: `[in]` int32, the input channel at every place; channels of 8 bits come last.
        fine_codes: `[out, k]` int8 codes of the weights of the last k places, which `QuantizedWeight` leaves out.
        fine_scale: `[out]` float16, the scales of `fine_codes`.
        codebook: Codebook of the weight's codes (`numerics.codebooks`).
        activation_group: Neighbouring channels of a token that share an activation scale; -1 for one scale per token.
        in_signs: `[in]` int8, 1 and -1: of `V^T = diag(signs) (left (x) right)`.
        in_left: `[a, a]` float16.
        in_right: `[b, b]` float16, a b = in.
        out_signs: `[out]` int8: likewise of `U^T`, for the outputs.
        out_left: `[c, c]` float16.
        out_right: `[d, d]` float16, c d = out.
        outlier_starts: `[out + 1]` int32, where the outliers of every output begin and end.
        outlier_columns: `[n]` int16 or int32, their input channels.
        outlier_values: `[n]` float16, what is added to the decoded weight; they multiply the unquantized input.
        image_router: `[in]` float16; a token with `image_router |x| > 0` is an image token.
        image_inverse: `[in]` float16, the factor on an image token's input, where other tokens have `inv_omega`.
        image_down: `[r, in]` float16, of the low-rank correction of image tokens; it reads the unquantized input.
        image_up: `[out, r]` float16.

    Example:
        >>> mask = torch.tensor([[False, True], [False, False]])
        >>> parts = TorchParts(**sparse_parts(mask, torch.full((2, 2), 9.0)))
        >>> parts.outliers(2, 2)
        tensor([[0., 9.],
                [0., 0.]])
    """

    order: Tensor | None = None
    fine_codes: Tensor | None = None
    fine_scale: Tensor | None = None
    codebook: Codebook = "integers"
    activation_group: int = PER_CHANNEL
    in_signs: Tensor | None = None
    in_left: Tensor | None = None
    in_right: Tensor | None = None
    out_signs: Tensor | None = None
    out_left: Tensor | None = None
    out_right: Tensor | None = None
    outlier_starts: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_values: Tensor | None = None
    image_router: Tensor | None = None
    image_inverse: Tensor | None = None
    image_down: Tensor | None = None
    image_up: Tensor | None = None

    @property
    def fine(self) -> int:
        """Number of input channels with codes of 8 bits."""
        return 0 if self.fine_codes is None else self.fine_codes.shape[1]

    def product(self, main: Tensor, tokens: Tensor, weight: Tensor, bits: int) -> Tensor:
        """The layer's output `[..., out]` float32 without low-rank correction and bias.

        Args:
            main: `[..., in]` float32, the scaled input.
            tokens: `[..., in]` float32, the input as it is.
            weight: `[out, in - k]` float32, decoded.
            bits: Width of the activation grid, 0 for none.
        """
        image = self._image(tokens)
        if image is not None and self.image_inverse is not None:
            main = torch.where(image, tokens * self.image_inverse.float(), main)
        if self.order is not None:
            main = main[..., self.order.long()]
        basis = self.basis("in")
        main = main if basis is None else basis(main)
        kept = main[..., : weight.shape[1]]
        y = _rounded(kept, bits, self.activation_group) @ weight.T
        if self.fine_codes is not None and self.fine_scale is not None:
            fine = fake_quantize_activation(main[..., weight.shape[1] :], FINE_BITS if rounds_activations(bits) else 0)
            y = y + fine @ (self.fine_codes.float() * self.fine_scale.float().unsqueeze(1)).T
        basis = self.basis("out")
        y = y if basis is None else basis.back(y)
        outliers = self.outliers(len(weight), tokens.shape[-1])
        y = y if outliers is None else y + tokens @ outliers.T
        if image is None or self.image_down is None or self.image_up is None:
            return y
        return torch.where(image, y + tokens @ self.image_down.float().T @ self.image_up.float().T, y)

    def _image(self, tokens: Tensor) -> Tensor | None:
        """Which of the tokens `[..., in]` are images', `[..., 1]` bool; None where all tokens are alike."""
        if self.image_router is None:
            return None
        return (tokens.abs() @ self.image_router.float()).unsqueeze(-1) > 0

    def basis(self, side: str) -> Rotation | None:
        """The change of basis of the inputs ("in") or the outputs ("out"), or None."""
        signs, left, right = (getattr(self, f"{side}_{part}") for part in ("signs", "left", "right"))
        if left is None or right is None:
            return None
        return Rotation(torch.ones(len(left) * len(right), device=left.device) if signs is None else signs, left, right)

    def outliers(self, out_features: int, in_features: int) -> Tensor | None:
        """The sparse matrix `[out, in]` float32, or None."""
        starts, columns, values = self.outlier_starts, self.outlier_columns, self.outlier_values
        if starts is None or columns is None or values is None:
            return None
        rows = torch.arange(out_features, device=values.device).repeat_interleave(starts.diff().long())
        dense = torch.zeros(out_features, in_features, device=values.device)
        dense[rows, columns.long()] = values.float()
        return dense

    def rows(self, start: int, stop: int) -> TorchParts:
        """The parts of output channels `start:stop`; only of layers whose outputs keep their basis."""
        if self.out_left is not None:
            raise ValueError("outputs in another basis cannot be cut apart")
        cut = replace(self)
        if self.fine_codes is not None and self.fine_scale is not None:
            fine = self.fine_codes[start:stop].clone(), self.fine_scale[start:stop].clone()
            cut = replace(cut, fine_codes=fine[0], fine_scale=fine[1])
        if self.outlier_starts is not None and self.outlier_columns is not None and self.outlier_values is not None:
            starts = self.outlier_starts[start : stop + 1]
            own = slice(int(starts[0]), int(starts[-1]))
            columns, values = self.outlier_columns[own].clone(), self.outlier_values[own].clone()
            cut = replace(cut, outlier_starts=starts - starts[0], outlier_columns=columns, outlier_values=values)
            if not len(values):
                cut = replace(cut, outlier_starts=None, outlier_columns=None, outlier_values=None)
        if self.image_up is not None:
            cut = replace(cut, image_up=self.image_up[start:stop].clone())
        return cut


PART_TENSORS = tuple(part.name for part in fields(TorchParts) if part.name not in ("activation_group", "codebook"))


def basis_parts(side: str, rotation: Rotation, *, signed: bool) -> dict[str, Any]:
    """A rotation as it is stored: the fields of `TorchParts` for one side.

    Example:
        >>> from qe_edge.numerics.orthogonal import hadamard_like
        >>> {name: tuple(tensor.shape) for name, tensor in basis_parts("in", hadamard_like(64), signed=True).items()}
        {'in_left': (8, 8), 'in_right': (8, 8), 'in_signs': (64,)}
    """
    stored = {f"{side}_left": rotation.left.half().contiguous(), f"{side}_right": rotation.right.half().contiguous()}
    return stored | ({f"{side}_signs": rotation.signs.to(torch.int8)} if signed else {})


def sparse_parts(mask: Tensor, values: Tensor) -> dict[str, Any]:
    """Outliers as they are stored: the fields of `TorchParts`.

    Args:
        mask: `[out, in]` bool, where they are.
        values: `[out, in]`, what they are there.

    Example:
        >>> weight = torch.tensor([[0.1, 9.0, 0.2], [7.0, 0.3, 8.0]])
        >>> {name: tensor.tolist() for name, tensor in sparse_parts(weight > 1, weight).items()}
        {'outlier_starts': [0, 1, 3], 'outlier_columns': [1, 0, 2], 'outlier_values': [9.0, 7.0, 8.0]}
    """
    counts = torch.cat([mask.new_zeros(1, dtype=torch.int32), mask.sum(1, dtype=torch.int32)])
    columns = mask.nonzero()[:, 1]
    return {
        "outlier_starts": counts.cumsum(0, dtype=torch.int32),
        "outlier_columns": columns.to(column_dtype(mask.shape[1])),
        "outlier_values": values[mask].half(),
    }


def column_dtype(in_features: int) -> torch.dtype:
    """The narrowest type that numbers the input channels.

    Example:
        >>> column_dtype(4096), column_dtype(65536)
        (torch.int16, torch.int32)
    """
    return torch.int16 if in_features <= 1 << 15 else torch.int32


def fine_parts(weight: Tensor) -> dict[str, Any]:
    """Weights `[out, k]` of channels with codes of 8 bits, as they are stored.

    Example:
        >>> parts = fine_parts(torch.tensor([[1.27, 0.5], [0.0, 12.7]]))
        >>> parts["fine_codes"].tolist(), [round(scale, 2) for scale in parts["fine_scale"].tolist()]
        ([[127, 50], [0, 127]], [0.01, 0.1])
    """
    codes, scale = quantize_int8(weight, 0)
    return {"fine_codes": codes, "fine_scale": scale}


def _rounded(x: Tensor, bits: int, group: int) -> Tensor:
    """Activations `[..., features]` rounded with one scale per token, or per token and group."""
    if group == PER_CHANNEL:
        return fake_quantize_activation(x, bits)
    return fake_quantize_activation(x.reshape(*x.shape[:-1], -1, group), bits).reshape(x.shape)
