"""Hooks that compare a quantized model with the original one, layer by layer, while both run on the same batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qe_edge.layers.linear import QELinear
from qe_edge.models.family import Block, Encoded
from qe_edge.models.streaming import first_tensor
from qe_edge.validate.metrics import RelativeError
from qe_edge.validate.schema import TokenErrors

KINDS = ("vision", "text")


@dataclass
class KindErrors:
    """Relative errors of vision tokens, text tokens and all tokens.

    Example:
        >>> errors = KindErrors()
        >>> masks = {"vision": torch.tensor([[True, True, False]]), "text": torch.tensor([[False, False, True]])}
        >>> exact, found = torch.tensor([[[1.0], [1.0], [2.0]]]), torch.tensor([[[1.0], [1.0], [2.5]]])
        >>> errors.add(exact, found, masks, place="layer 'up_proj'")
        >>> errors.result().vision, errors.result().text
        (0.0, 0.25)
    """

    kinds: dict[str, RelativeError] = field(default_factory=lambda: {kind: RelativeError() for kind in KINDS})

    def add(self, reference: Tensor, other: Tensor, masks: Mapping[str, Tensor] | None, place: str) -> None:
        """Add outputs `[..., features]`; without masks every token counts as a vision token.

        Args:
            reference: Output of the original.
            other: Output of the quantized model.
            masks: Mask of each kind of token.
            place: The layer or block, for messages.

        Raises:
            NumericalError: If an output is not finite.
        """
        names = f"the original's {place}", f"the quantized model's {place}"
        for kind, (wanted, found) in _split(masks, reference, other):
            self.kinds[kind].add(wanted, found, names)

    def result(self) -> TokenErrors:
        """The errors so far."""
        parts = self.kinds.values()
        joint = RelativeError(
            sum(part.error for part in parts), sum(part.norm for part in parts), sum(part.rows for part in parts)
        )
        return TokenErrors(
            all=joint.value(),
            vision=self.kinds["vision"].value(),
            text=self.kinds["text"].value(),
            tokens=joint.rows,
        )


class LayerProbe:
    """Feeds every quantized layer the input that the original layer sees, and compares the outputs.

    Args:
        original: The original model.
        layers: Quantized layers by dotted name.
        groups: Group of every layer.

    Example:
        >>> import numpy as np
        >>> from qe_edge.layers.linear import QuantizedLinear
        >>> from qe_edge.numerics.grids import WeightGrid, quantize_weight
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(64, 32, bias=False))
        >>> layer = QELinear(QuantizedLinear(quantize_weight(model[0].weight.detach(), WeightGrid(bits=4)), 8))
        >>> probe = LayerProbe(model, {"0": layer}, {"0": "visual"})
        >>> nothing = np.zeros((1, 1), np.int64)
        >>> with probe.watching(Encoded(nothing, nothing, nothing.astype(bool), nothing.astype(bool))), torch.no_grad():
        ...     _ = model(torch.randn(10, 64))
        >>> print(f"{probe.errors['0'].result().all:.3f} on {probe.errors['0'].result().tokens} tokens")
        0.069 on 10 tokens
    """

    def __init__(self, original: nn.Module, layers: Mapping[str, QELinear], groups: Mapping[str, str]) -> None:
        self._original = original
        self._layers = layers
        self._groups = groups
        self.errors = {name: KindErrors() for name in layers}
        self.load = {
            name: {kind: torch.zeros(layer.num_experts, dtype=torch.int64) for kind in KINDS}
            for name, layer in layers.items()
            if layer.router is not None
        }

    @contextmanager
    def watching(self, encoded: Encoded) -> Iterator[None]:
        """Measure while the original model runs on `encoded` inside the context."""
        masks = token_masks(encoded)

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            layer, group = self._layers[name], self._groups[name]

            def measure(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                own = masks if group == "language" else None
                self.errors[name].add(output, layer(inputs[0]), own, f"layer '{name}'")
                expert = layer.expert_index(inputs[0])
                if expert is not None:
                    for kind, (chosen,) in _split(own, expert.unsqueeze(-1)):
                        self.load[name][kind] += torch.bincount(chosen[:, 0], minlength=layer.num_experts)

            return measure

        with _hooks((self._original.get_submodule(name), hook(name)) for name in self._layers):
            yield


class StreamProbe:
    """Compares the hidden states that leave the blocks of two models, each on its own stream.

    Example:
        >>> import numpy as np
        >>> _ = torch.manual_seed(0)
        >>> one, other = nn.Linear(64, 64), nn.Linear(64, 64)
        >>> probe = StreamProbe([Block("block", one, "visual")], [Block("block", other, "visual")])
        >>> nothing, tokens = np.zeros((1, 1), np.int64), torch.randn(10, 64)
        >>> encoded = Encoded(nothing, nothing, nothing.astype(bool), nothing.astype(bool))
        >>> with probe.recording(), torch.no_grad():
        ...     _ = one(tokens)
        >>> with probe.comparing(encoded), torch.no_grad():
        ...     _ = other(tokens)
        >>> f"{probe.errors['block'].result().all:.1f}"  # two unrelated models: about the square root of 2
        '1.4'
    """

    def __init__(self, blocks: list[Block], others: list[Block]) -> None:
        self._blocks = blocks
        self._others = others
        self._outputs: dict[str, Tensor] = {}
        self.errors = {block.name: KindErrors() for block in blocks}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the original's outputs of one batch."""

        def hook(name: str) -> Callable[..., None]:
            def keep(_module: nn.Module, _inputs: object, output: object) -> None:
                self._outputs[name] = first_tensor(output).detach()

            return keep

        with _hooks((block.module, hook(block.name)) for block in self._blocks):
            yield

    @contextmanager
    def comparing(self, encoded: Encoded) -> Iterator[None]:
        """Compare the other model's outputs on the same batch."""
        masks = token_masks(encoded)

        def hook(block: Block) -> Callable[..., None]:
            own = masks if block.group == "language" else None

            def compare(_module: nn.Module, _inputs: object, output: object) -> None:
                wanted, found = self._outputs.pop(block.name), first_tensor(output)
                self.errors[block.name].add(wanted, found, own, f"block '{block.name}'")

            return compare

        with _hooks((block.module, hook(block)) for block in self._others):
            yield


def token_masks(encoded: Encoded) -> dict[str, Tensor]:
    """Masks `[batch, sequence]` of picture and text tokens; padding is in neither.

    Example:
        >>> import numpy as np
        >>> ids, padding = np.array([[0, 9, 5, 6]]), np.array([[0, 1, 1, 1]])
        >>> masks = token_masks(Encoded(ids, padding, ids == 9, ids == 6))
        >>> masks["vision"].int().tolist(), masks["text"].int().tolist()
        ([[0, 1, 0, 0]], [[0, 0, 1, 1]])
    """
    valid, image = encoded.attention_mask.astype(bool), encoded.image_mask
    return {"vision": torch.from_numpy(valid & image), "text": torch.from_numpy(valid & ~image)}


def _split(masks: Mapping[str, Tensor] | None, *tensors: Tensor) -> Iterator[tuple[str, list[Tensor]]]:
    """Rows `[n, features]` of every kind of token."""
    if masks is None:
        yield "vision", [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
        return
    for kind, mask in masks.items():
        yield kind, [tensor[mask] for tensor in tensors]


@contextmanager
def _hooks(pairs: Iterator[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
