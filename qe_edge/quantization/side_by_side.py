"""Quantize a block's layers one by one, each on its inputs in the original model and in the quantized model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from qe_edge.calibration.sensitivity import IMAGE, token_kinds
from qe_edge.calibration.statistics import StatisticsCollector, StatisticsRequest
from qe_edge.layers.linear import QELinear
from qe_edge.methods import LinearProblem
from qe_edge.models.family import Block
from qe_edge.models.groups import LinearGroup, set_module
from qe_edge.models.rotation import residual_norms
from qe_edge.models.streaming import BlockCall, Chain, fast_products, run_block
from qe_edge.quantization.problems import Member, Problems
from qe_edge.quantization.walk import BlockWalk
from qe_edge.reconstruction.problem import Drift
from qe_edge.system.device import CPU, moved

Quantize = Callable[[Member, LinearProblem], dict[str, QELinear]]


class SideBySide:
    """Walks the original model beside the quantized one: holds the original's hidden states beside the walk's.

    Args:
        walk: The walk whose blocks are quantized.
        problems: Makes the layers' problems.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.models.groups import linear_groups
        >>> from qe_edge.models.loading import load_model
        >>> from qe_edge.quantization.problems import Measured
        >>> from qe_edge.recipes.recipe import make_recipe
        >>> loaded, recipe = load_model("demo"), make_recipe(method="loaq")
        >>> batch = loaded.family.encode(loaded.processor, load_samples("demo", 2), answers=True)
        >>> walk = BlockWalk(loaded, ["language"], [batch], torch.device("cpu"))
        >>> both = SideBySide(walk, Problems(recipe, recipe.build_method(), walk.device, Measured()))
        >>> chain, position, block = next(iter(walk))
        >>> drifts = []
        >>> def look(member: Member, problem: LinearProblem) -> dict[str, QELinear]:
        ...     drifts.append(float(problem.drift.inputs.norm()))
        ...     return {}  # whoever quantizes returns the layers
        >>> groups = linear_groups(block, loaded.family.siblings)
        >>> with walk.original(block):
        ...     layers = both.quantize(chain, position, block, groups, None, look)
        >>> drifts == [0.0] * 7  # both models are alike so far
        True
    """

    def __init__(self, walk: BlockWalk, problems: Problems) -> None:
        self.walk = walk
        self.problems = problems
        self.hidden: list[Tensor] = []  # hidden states that enter the current block in the original model

    def quantize(
        self,
        chain: Chain,
        position: int,
        block: Block,
        groups: list[LinearGroup],
        finished: dict[str, QELinear] | None,
        work: Quantize,
    ) -> dict[str, QELinear]:
        """Quantize the layers of a block, put them into it, and move the original's hidden states on to the next one.

        Args:
            chain: The block's chain.
            position: The block's place in it.
            block: The block with its original layers.
            groups: Its layers in the order of the data.
            finished: Its quantized layers, if an earlier run has made them.
            work: Quantizes the layers of one problem.
        """
        if not position:
            self.hidden = chain.hidden
        original = replace(block, module=copy.deepcopy(block.module))
        layers = finished or {}
        if not finished:
            for group in groups:
                made = self._quantize_group(chain, position, (original, block), group, work)
                for name, layer in made.items():
                    set_module(self.walk.loaded.model, name, layer)
                layers.update(made)
        with self._ready(original):
            calls = chain.calls[position]
            self.hidden = [
                run_block(original.module, hidden, calls[batch], self.walk.device)
                for batch, hidden in enumerate(self.hidden)
            ]
        return layers

    def _quantize_group(
        self, chain: Chain, position: int, blocks: tuple[Block, Block], group: LinearGroup, work: Quantize
    ) -> dict[str, QELinear]:
        """The quantized layers of one group."""
        original, block = blocks
        local = group.names[0].removeprefix(f"{block.name}.")
        members = self.problems.members(group)
        weights = [member.weight for member in members]
        asked = self.problems.joint_request(weights) or StatisticsRequest(tokens=0)
        collector = StatisticsCollector(
            group.names[0],
            weights[0].shape[1],
            weights,
            replace(asked, gram=False),  # it is weighed here
            self.problems.seed(group.names[0]),
            self.problems.at_work,
        )
        sums = _Sums()
        with self._ready(original), self._ready(block):
            for batch in range(len(chain.hidden)):
                call, mask = chain.calls[position][batch], self.walk.valid_tokens(block, chain.batches[batch])
                exact, found = (
                    _Seen.of(side.module, local, hidden, call, self.walk.device).masked(mask)
                    for side, hidden in ((original, self.hidden[batch]), (block, chain.hidden[batch]))
                )
                kinds = torch.full((len(found.inputs),), IMAGE, dtype=torch.int8)
                if mask is not None:
                    kinds = torch.from_numpy(token_kinds(self.walk.batches[chain.batches[batch]]))[mask]
                collector.update(found.inputs, kinds)
                if collector.dropped:
                    raise self.walk.not_finite(
                        f"The input of '{group.names[0]}' is", found.inputs, chain.batches[batch], None
                    )
                sums.add(exact, found, original.module.get_submodule(local), weigh=self.problems.method.weighs_norms)
        layers: dict[str, QELinear] = {}
        measured = collector.finish()
        gram, drift = sums.means()
        for number, member in enumerate(members):
            there = gram.numpy() if self.problems.at_work == CPU else gram.to(self.problems.at_work)
            problem = self.problems.problem(member, replace(measured[number], gram=there))
            layers |= work(member, replace(problem, drift=drift.scaled(member.factors)))
        return layers

    @contextmanager
    def _ready(self, block: Block) -> Iterator[None]:
        with moved(block.module, self.walk.device), fast_products(block.module):
            yield


@dataclass(frozen=True)
class _Seen:
    """Input of a layer on one batch, and the residual stream that its output is added to.

    Attributes:
        inputs: `[..., in]` float32.
        stream: `[..., out]` float32, or None where the output is not added to it.
    """

    inputs: Tensor
    stream: Tensor | None

    @classmethod
    def of(cls, block: nn.Module, name: str, hidden: Tensor, call: BlockCall, device: torch.device) -> _Seen:
        """Run a block as far as its layer `name`."""
        seen: dict[str, Tensor] = {}

        def keep(key: str, *, stop: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                seen[key] = inputs[0].detach().float().cpu()
                if stop:
                    raise _Reached

            return hook

        handles = [block.get_submodule(name).register_forward_pre_hook(keep("inputs", stop=True))]
        norm = residual_norms(block).get(name)
        if norm is not None:
            handles.append(norm.register_forward_pre_hook(keep("stream", stop=False)))
        try:
            with suppress(_Reached):
                run_block(block, hidden, call, device)
        finally:
            for handle in handles:
                handle.remove()
        return cls(seen["inputs"], seen.get("stream"))

    def masked(self, mask: Tensor | None) -> _Seen:
        """The tokens that count, `[n, ...]`."""
        inputs, stream = (
            None if part is None else part.reshape(-1, part.shape[-1]) if mask is None else part[mask]
            for part in (self.inputs, self.stream)
        )
        return _Seen(self.inputs if inputs is None else inputs, stream)


class _Sums:
    """Products of a layer's inputs in both models, in float64."""

    def __init__(self) -> None:
        self._count = 0
        self._gram: Tensor | float = 0.0
        self._inputs: Tensor | float = 0.0
        self._stream: Tensor | float | None = None

    def add(self, exact: _Seen, found: _Seen, layer: nn.Module, *, weigh: bool) -> None:
        """Add the tokens of a batch, weighed by the norm that follows if `weigh`."""
        x, read = exact.inputs.double(), found.inputs.double()
        weighed = read
        if exact.stream is not None and found.stream is not None:
            if weigh:
                state = exact.stream.double() + _output(layer, exact.inputs)
                weighed = read / state.square().mean(1, keepdim=True).clamp_min(1e-12)
            apart = (exact.stream.double() - found.stream.double()).T @ weighed
            self._stream = apart if self._stream is None else self._stream + apart
        self._gram = self._gram + read.T @ weighed
        self._inputs = self._inputs + (x - read).T @ weighed
        self._count += len(read)

    def means(self) -> tuple[Tensor, Drift]:
        """The Gram matrix `[in, in]`, and what is to be made up for."""
        gram, inputs = torch.as_tensor(self._gram) / self._count, torch.as_tensor(self._inputs) / self._count
        stream = None if self._stream is None else torch.as_tensor(self._stream) / self._count
        return gram, Drift(inputs, stream)


def _output(layer: nn.Module, inputs: Tensor) -> Tensor:
    """A linear layer's output `[n, out]` float64, in the CPU's memory."""
    with torch.no_grad():
        bias = layer.get_parameter("bias").float().cpu() if getattr(layer, "bias", None) is not None else None
        return functional.linear(inputs, layer.get_parameter("weight").float().cpu(), bias).double()


class _Reached(Exception):  # noqa: N818 - control flow, not an error
    """The layer has its input; the rest of the block need not run."""
