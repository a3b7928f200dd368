"""Runs a model block by block on calibration data, so that only one block at a time is held in float32.

The inputs of the first block of a chain and the further arguments of every block are recorded in one forward pass in
which the blocks themselves are skipped; then the blocks run one after the other on the recorded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.models.family import Block
from qe_edge.system.device import CPU, multiplies_bfloat16, to_device
from qe_edge.system.errors import ModelError

LARGE_PRODUCT = 1 << 28  # multiplications from which a linear layer has a product of its own: about a millisecond


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
        batches: Numbers of the batches that reach the chain, ascending; one without pictures reaches no vision block.
        hidden: For each of these batches the hidden states that enter the next block.
        calls: For every block and each of these batches the further arguments.
    """

    blocks: list[Block]
    batches: list[int] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[BlockCall]] = field(default_factory=list)


def chains_of(blocks: Sequence[Block]) -> list[list[Block]]:
    """Group neighbouring blocks of the same kind that feed each other: visual, merger, language.

    Example:
        >>> names = [("visual.0", "visual"), ("visual.1", "visual"), ("layers.0", "language")]
        >>> blocks = [Block(name, nn.Identity(), group) for name, group in names]
        >>> [[block.name for block in chain] for chain in chains_of(blocks)]
        [['visual.0', 'visual.1'], ['layers.0']]
    """
    chains: list[list[Block]] = []
    for block in blocks:
        if chains and chains[-1][-1].group == block.group and not chains[-1][-1].ends_chain:
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
        beyond: The model's further chains, which no batch has to reach.

    Example:
        >>> blocks = [Block(str(number), nn.Linear(4, 4), "language") for number in range(2)]
        >>> model = nn.Sequential(*(block.module for block in blocks))
        >>> streamer = Streamer(model, chains_of(blocks), batches=1, forward=lambda number: model(torch.ones(3, 4)))
        >>> chain = streamer.record(0)  # the blocks themselves do not run
        >>> chain.batches, tuple(chain.hidden[0].shape)
        ([0], (3, 4))
    """

    def __init__(
        self,
        model: nn.Module,
        chains: Sequence[list[Block]],
        batches: int,
        forward: Callable[[int], object],
        beyond: Sequence[list[Block]] = (),
    ) -> None:
        self.model = model
        self.batches = batches
        self._chains = list(chains)
        self._beyond = list(beyond)
        self._forward = forward
        self._finished: list[Chain] = []

    def record(self, index: int) -> Chain:
        """Record the inputs of chain number `index`; chains before it replay their final outputs."""
        chain = Chain(self._chains[index], calls=[[] for _ in self._chains[index]])
        later = [chain[0].module for chain in [*self._chains[index + 1 :], *self._beyond]]
        for batch in range(self.batches):
            with suppress(_ChainRecorded), self._replaying(batch), _stopping(later), _recording(chain), torch.no_grad():
                self._forward(batch)
            if len(chain.hidden) > len(chain.batches):
                chain.batches.append(batch)
        return chain

    def finish(self, chain: Chain) -> None:
        """Keep a chain's final outputs, so that later chains see them."""
        self._finished.append(chain)

    @contextmanager
    def _replaying(self, batch: int) -> Iterator[None]:
        """Blocks of finished chains pass their input through; the last one returns the chain's recorded output."""
        with patched(
            [
                (block.module, _replay(chain.hidden[chain.batches.index(batch)] if block is chain.blocks[-1] else None))
                for chain in self._finished
                if batch in chain.batches
                for block in chain.blocks
            ]
        ):
            yield


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall, device: torch.device = CPU) -> Tensor:
    """Run one block, which is on `device`, on one batch. Its hidden states are returned in the CPU's memory.

    Example:
        >>> block = nn.Linear(4, 4)
        >>> tuple(run_block(block, torch.ones(3, 4), BlockCall((), {})).shape)
        (3, 4)
    """
    args, kwargs = call.args, call.kwargs
    if device != CPU:
        hidden, args, kwargs = to_device((hidden, args, kwargs), device)
    with torch.no_grad():
        return first_tensor(block(hidden, *args, **kwargs)).to(CPU)


@contextmanager
def fast_products(block: nn.Module, narrow: Collection[nn.Module] = ()) -> Iterator[None]:
    """Large products of a block's linear layers in float32 on the CPU are fast while the context is open.

    Those of layers in `narrow`, whose weights are bfloat16 in the model's files, are computed from bfloat16 inputs, as
    the model itself does, where the processor multiplies them (twice as fast); the others by numpy's BLAS (torch's is
    half as fast on some processors). A weight of another type than the inputs stays as it is: a product makes a copy of
    its own. There are no gradients.

    Example:
        >>> layer = nn.Linear(256, 256, dtype=torch.bfloat16)
        >>> with fast_products(layer), torch.no_grad():
        ...     tuple(layer(torch.ones(8, 256, dtype=torch.bfloat16)).shape)
        (8, 256)
    """
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    if not multiplies_bfloat16():
        narrow = ()
    with patched([(linear, _fast_linear(linear, narrow=linear in narrow)) for linear in linears]):
        yield


def _fast_linear(linear: nn.Linear, *, narrow: bool) -> Callable[[Tensor], Tensor]:
    weight = linear.weight.detach()

    def forward(x: Tensor) -> Tensor:
        float_on_cpu = x.dtype == torch.float32 and x.device == weight.device == CPU
        own: Tensor | None = linear.bias
        bias = None if own is None else own.to(x.dtype)
        if not float_on_cpu or x.numel() * len(weight) < LARGE_PRODUCT:
            return nn.functional.linear(x, weight.to(x.dtype), bias)
        if narrow:
            y = nn.functional.linear(x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()).float()
        else:
            y = torch.from_numpy(x.detach().reshape(-1, x.shape[-1]).numpy() @ weight.float().numpy().T)
        if bias is not None:
            y += bias
        return y.reshape(*x.shape[:-1], -1)

    return forward


def first_tensor(output: Any) -> Tensor:  # noqa: ANN401 - checked here
    """Hidden states of a block's output. Blocks of every supported transformers return nothing else.

    Raises:
        ModelError: If they do: a tensor replayed in place of a tuple would be taken apart along its batch.

    Example:
        >>> first_tensor(torch.tensor([1.0]))
        tensor([1.])
    """
    if not isinstance(output, Tensor):
        raise ModelError(
            f"A block of this model returns a {type(output).__name__}, not its hidden states.",
            "Install a newer transformers: pip install -U transformers.",
        )
    return output


class _ChainRecorded(Exception):  # noqa: N818 - control flow, not an error
    """The last block of the chain, or a later chain, has been reached; the rest of the model need not run."""


@contextmanager
def _recording(chain: Chain) -> Iterator[None]:
    """Blocks of `chain` note their arguments and pass the hidden states through."""

    def recorder(position: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
            hidden_states, call = _parted(args, kwargs)
            if position == 0:
                chain.hidden.append(hidden_states.detach())
            chain.calls[position].append(call)
            if position == len(chain.blocks) - 1:
                raise _ChainRecorded
            return hidden_states

        return forward

    with patched([(block.module, recorder(position)) for position, block in enumerate(chain.blocks)]):
        yield


def _stop(*_args: Any, **_kwargs: Any) -> Tensor:  # noqa: ANN401
    raise _ChainRecorded


@contextmanager
def _stopping(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The forward pass ends at any of `modules`: a batch that did not touch the chain got past it."""
    with patched([(module, _stop) for module in modules]):
        yield


def _replay(output: Tensor | None) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        return _parted(args, kwargs)[0] if output is None else output

    return forward


def _parted(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Hidden states, the first argument, which transformers gives some blocks by name; and all others."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    (_, hidden_states), *others = kwargs.items()
    return hidden_states, BlockCall((), dict(others))


@contextmanager
def patched(replacements: Sequence[tuple[nn.Module, Callable[..., Tensor]]]) -> Iterator[None]:
    """Replace the forward of modules for the duration of the context.

    Example:
        >>> layer = nn.Identity()
        >>> with patched([(layer, lambda hidden: hidden + 1)]):
        ...     layer(torch.tensor([1.0]))
        tensor([2.])
        >>> layer(torch.tensor([1.0]))
        tensor([1.])
    """
    for module, forward in replacements:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, _ in replacements:
            module.__dict__.pop("forward", None)
