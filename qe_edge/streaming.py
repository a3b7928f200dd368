"""Runs a model block by block on calibration data, so that only one block at a time is held in float32.

The inputs of the first block of a chain and the further arguments of every block are recorded in one forward pass in
which the blocks themselves are skipped; then the blocks run one after the other on the recorded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.models.family import Block


@dataclass
class BlockCall:
    """Arguments of one call of a block, without the hidden states.

    Attributes:
        args: Further positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Chain:
    """Blocks of one group that feed each other, with the recorded inputs of every calibration batch.

    Attributes:
        blocks: The blocks in order.
        hidden: For every batch the hidden states that enter the next block.
        calls: For every block and batch the further arguments.
    """

    blocks: list[Block]
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[BlockCall]] = field(default_factory=list)


def chains_of(blocks: Sequence[Block]) -> list[list[Block]]:
    """Group neighbouring blocks of the same kind: visual, merger, language."""
    chains: list[list[Block]] = []
    for block in blocks:
        if chains and chains[-1][0].group == block.group:
            chains[-1].append(block)
        else:
            chains.append([block])
    return chains


class Streamer:
    """Walks a model's chains in order and hands out each block with its inputs.

    Args:
        model: The model, in evaluation mode.
        chains: Chains in data-flow order.
        batches: Number of calibration batches.
        forward: Runs the whole model on batch number `i`.
    """

    def __init__(
        self, model: nn.Module, chains: Sequence[list[Block]], batches: int, forward: Callable[[int], object]
    ) -> None:
        self.model = model
        self.batches = batches
        self._chains = list(chains)
        self._forward = forward
        self._finished: list[Chain] = []

    def record(self, index: int) -> Chain:
        """Record the inputs of chain number `index`; chains before it replay their final outputs."""
        chain = Chain(self._chains[index], calls=[[] for _ in self._chains[index]])
        for batch in range(self.batches):
            with self._replaying(batch), _recording(chain), torch.no_grad():
                try:
                    self._forward(batch)
                except _ChainRecorded:
                    pass
        return chain

    def finish(self, chain: Chain) -> None:
        """Keep a chain's final outputs, so that later chains see them."""
        self._finished.append(chain)

    @contextmanager
    def _replaying(self, batch: int) -> Iterator[None]:
        """Blocks of finished chains pass their input through; the last one returns the chain's recorded output."""
        with _patched(
            [
                (block.module, _replay(chain.hidden[batch] if block is chain.blocks[-1] else None))
                for chain in self._finished
                for block in chain.blocks
            ]
        ):
            yield


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """One block on one batch; returns the hidden states that leave it."""
    with torch.no_grad():
        return first_tensor(block(hidden, *call.args, **call.kwargs))


def first_tensor(output: Any) -> Tensor:  # noqa: ANN401 - blocks return a tensor or a tuple that starts with one
    """Hidden states of a block's output."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


class _ChainRecorded(Exception):  # noqa: N818 - control flow, not an error
    """The last block of the chain has been reached; the rest of the model need not run."""


@contextmanager
def _recording(chain: Chain) -> Iterator[None]:
    """Blocks of `chain` note their arguments and pass the hidden states through."""

    def recorder(position: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
            if position == 0:
                chain.hidden.append(hidden_states.detach())
            chain.calls[position].append(BlockCall(args, kwargs))
            if position == len(chain.blocks) - 1:
                raise _ChainRecorded
            return hidden_states

        return forward

    with _patched([(block.module, recorder(position)) for position, block in enumerate(chain.blocks)]):
        yield


def _replay(output: Tensor | None) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:  # noqa: ANN401
        return hidden_states if output is None else output

    return forward


@contextmanager
def _patched(replacements: Sequence[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Replace the forward of modules for the duration of the context."""
    for module, forward in replacements:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in replacements:
            module.__dict__.pop("forward", None)
