"""Blocks that run without a graph and are run again, with one, when their gradient arrives: one block in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qe_edge.models.family import Block
from qe_edge.models.loading import LoadedModel
from qe_edge.models.precision import in_float32, own_tensors
from qe_edge.models.streaming import first_tensor


class BlockWeights:
    """Blocks on a device in float32, from their files for every batch anew.

    Blocks that fit into half of the device's free memory stay there, in the model's own types. Every batch needs every
    block twice, and reading a block from its file and moving it takes longer than its products.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> block = loaded.family.blocks(loaded.model)[0]
        >>> with BlockWeights(loaded, torch.device("cpu")).ready(block):
        ...     next(block.module.parameters()).dtype
        torch.float32
    """

    def __init__(self, loaded: LoadedModel, device: torch.device, room: int | None = None) -> None:
        self._loaded, self._device = loaded, device
        self._room = (torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0) if room is None else room
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def ready(self, block: Block) -> Iterator[None]:
        """The block's weights are there in float32."""
        modules = list(block.module.modules())
        copies = self._kept.get(block.name)
        if copies is None:
            with self._loaded.stored.held(block.name, block.module):
                self._keep(block.name, list(own_tensors(modules)))
                with in_float32(modules, self._device):
                    yield
            return
        before = [(tensor, tensor.data) for tensor, _ in copies]
        for tensor, copy in copies:
            tensor.data = copy.float() if copy.is_floating_point() else copy
        try:
            yield
        finally:
            for tensor, data in before:
                tensor.data = data

    def _keep(self, name: str, tensors: list[Tensor]) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if size <= self._room:
            self._room -= size
            self._kept[name] = [(tensor, tensor.data.to(self._device)) for tensor in tensors]


def recomputed(weights: BlockWeights, block: Block, *, wanted: bool) -> Callable[..., Tensor]:
    """A block's forward that keeps only its input; `wanted` blocks ask for gradients even where nothing before does.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> block = loaded.family.blocks(loaded.model)[0]
        >>> forward = recomputed(BlockWeights(loaded, torch.device("cpu")), block, wanted=True)  # replaces the block's
    """
    original = block.module.forward

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        if wanted and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()
        run = _Run(lambda: weights.ready(block), lambda hidden: first_tensor(original(hidden, *args, **kwargs)))
        result: Tensor = _Recompute.apply(hidden_states, run)  # type: ignore[no-untyped-call] # torch has no types here
        return result

    return forward


@dataclass(frozen=True)
class _Run:
    """One call of a block: a context in which its weights are there in float32, and the hidden states' function."""

    ready: Callable[[], AbstractContextManager[None]]
    call: Callable[[Tensor], Tensor]


class _Recompute(torch.autograd.Function):
    """Runs without a graph, and again with one when the gradient arrives."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: _Run) -> Tensor:  # noqa: ANN401 - torch's own
        """Run the block without a graph."""
        ctx.run = run
        ctx.save_for_backward(hidden)
        with run.ready():
            return run.call(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:  # noqa: ANN401
        """Run the block with a graph, and go back through it."""
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with ctx.run.ready(), torch.enable_grad():
            torch.autograd.backward(ctx.run.call(hidden), gradient)
        return hidden.grad, None
