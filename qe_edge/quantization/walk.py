"""Walks the blocks of a model in the order of the data, each on its recorded calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from qe_edge.calibration.sensitivity import IMAGE, token_kinds
from qe_edge.calibration.statistics import StatisticsCollector
from qe_edge.models.family import Block, Encoded
from qe_edge.models.groups import LinearGroup
from qe_edge.models.loading import LoadedModel
from qe_edge.models.precision import make_float32, restore_dtypes
from qe_edge.models.streaming import Chain, Streamer, chains_of, fast_products, run_block
from qe_edge.models.tables import read_by_rows, tables_of
from qe_edge.system.device import moved
from qe_edge.system.errors import NumericalError
from qe_edge.system.heap import reused_memory


class BlockWalk:
    """Runs the chains of a model up to the last one that is selected.

    Args:
        loaded: The model; its parts outside the blocks are brought to float32.
        modules: Groups of blocks that are selected.
        batches: Encoded calibration samples.
        device: Device that computes blocks. Between two blocks everything is in the CPU's memory.
        to_the_end: Whether the last block's outputs are needed too.

    Example:
        >>> from qe_edge.calibration.sources import load_samples
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> batch = loaded.family.encode(loaded.processor, load_samples("demo", 2), answers=True)
        >>> walk = BlockWalk(loaded, ["language"], [batch], torch.device("cpu"))
        >>> chain, position, block = next(iter(walk))
        >>> block.name, tuple(chain.hidden[0].shape) == (*batch.input_ids.shape, 256)
        ('model.language_model.layers.0', True)
    """

    def __init__(
        self,
        loaded: LoadedModel,
        modules: Sequence[str],
        batches: Sequence[Encoded],
        device: torch.device,
        *,
        to_the_end: bool = False,
    ) -> None:
        self.loaded = loaded
        self.to_the_end = to_the_end
        self.batches = batches
        self.device = device
        self.modules = modules
        self._kept: list[dict[str, Any]] = [{} for _ in batches]
        self.blocks = loaded.family.blocks(loaded.model)
        walked = chains_of(self.blocks)
        self._beyond: list[list[Block]] = []
        while walked and walked[-1][0].group not in modules:
            self._beyond.append(walked.pop())
        self.walked = walked
        self.chains = [chain for chain in walked if chain[0].group in modules]
        self.sizes = {block.name: parameters_of(block) for block in self.blocks}
        self._dtypes = {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()}
        # what is not streamed computes in float32 from now on; streamed blocks follow one by one
        streamed = {module for block in self.blocks for module in block.module.modules()}
        streamed.update(tables_of(loaded.model).values())
        make_float32(module for module in loaded.model.modules() if module not in streamed)

    def __iter__(self) -> Iterator[tuple[Chain, int, Block]]:
        """Every selected block with its recorded inputs. Blocks before them that are not selected only run.

        The caller has to leave a block's outputs in the chain (`hand_on`) before it asks for the next one.
        """
        streamer = Streamer(self.loaded.model, self.walked, len(self.batches), self._forward, self._beyond)
        for index in range(len(self.walked)):
            chain = streamer.record(index)
            for position, block in enumerate(chain.blocks):
                if block.group in self.modules:
                    yield chain, position, block
                    continue
                with self.original(block):
                    self.hand_on(chain, position, self.run(chain, position, block, {}))
            streamer.finish(chain)

    @staticmethod
    def hand_on(chain: Chain, position: int, outputs: list[Tensor]) -> None:
        """Make the outputs of a chain's block the inputs of the next one, and forget the block's other arguments."""
        chain.hidden, chain.calls[position] = outputs, []

    @contextmanager
    def original(self, block: Block) -> Iterator[None]:
        """A block is ready to run while the context is open; afterwards it is as it was before."""
        with self.loaded.stored.held(block.name, block.module):
            self.make_ready(block)
            yield
            self.restore_block(block)

    def make_ready(self, block: Block) -> None:
        """Bring a block into memory, to run in float32.

        Its linear layers, nearly all of it, keep the types of their files: `run` computes with them as they are.
        """
        self.loaded.stored.read(block.name, block.module)
        make_float32(module for module in block.module.modules() if type(module) is not nn.Linear)

    def release_linears(self, groups: Sequence[LinearGroup]) -> None:
        """Let the weights of layers go that lie in files. Each problem reads its own, if `Problems` knows the files."""
        for group in groups:
            for name, linear in zip(group.names, group.linears, strict=True):
                self.loaded.stored.release(name, linear)

    def restore_block(self, block: Block) -> None:
        """Bring the tensors of a block that were not quantized back to their original precision."""
        names = block.module.state_dict()
        known = {name: self._dtypes.get(f"{block.name}.{name}") for name in names}
        restore_dtypes(block.module, {name: dtype for name, dtype in known.items() if dtype})

    def restore(self) -> None:
        """Bring all tensors that were not quantized back to their original precision."""
        restore_dtypes(self.loaded.model, self._dtypes)

    def run(
        self, chain: Chain, position: int, block: Block, collectors: Mapping[nn.Module, StatisticsCollector]
    ) -> list[Tensor]:
        """Run a block on every batch, feeding each collector with the inputs of its layer; returns the outputs.

        The last block's outputs are needed only if the walk goes to the end. Otherwise the block runs until every
        collector has its inputs, and no outputs are returned.

        Raises:
            NumericalError: At the first batch with NaN or infinity in a layer's input or the block's output.
        """
        valid: list[Tensor | None] = [None]
        kinds: list[Tensor | None] = [None]
        waiting: set[StatisticsCollector] = set()
        number = 0
        last = not self.to_the_end and chain.blocks == self.walked[-1] and position == len(chain.blocks) - 1
        if last and not collectors:
            return []

        def feed(collector: StatisticsCollector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                tokens = inputs[0]
                mask = valid[0]
                if mask is None:
                    collector.update(tokens, torch.full(tokens.shape[:-1], IMAGE, dtype=torch.int8))
                else:
                    collector.update(tokens if bool(mask.all()) else tokens[mask.to(tokens.device)], kinds[0])
                if collector.dropped:
                    raise self.not_finite(f"The input of '{collector.name}' is", tokens, number, mask)
                waiting.discard(collector)
                if last and not waiting:
                    raise _AllFed

            return hook

        handles = [layer.register_forward_pre_hook(feed(collector)) for layer, collector in collectors.items()]
        try:
            outputs = []
            with self.computing(block):
                for batch, hidden in enumerate(chain.hidden):
                    number = chain.batches[batch]
                    valid[0] = self.valid_tokens(block, batch)
                    if valid[0] is not None:
                        kinds[0] = torch.from_numpy(token_kinds(self.batches[batch]))[valid[0]]
                    waiting.update(collectors.values())
                    with suppress(_AllFed):
                        outputs.append(run_block(block.module, hidden, chain.calls[position][batch], self.device))
                        if not _finite(outputs[-1], valid[0]):
                            raise self.not_finite(f"The output of '{block.name}' is", outputs[-1], number, valid[0])
        finally:
            for handle in handles:
                handle.remove()
        return outputs

    @contextmanager
    def computing(self, block: Block) -> Iterator[None]:
        """A block that is ready lies on the device and computes fast while the context is open."""
        with moved(block.module, self.device), fast_products(block.module, self._narrow(block)), reused_memory():
            yield

    def valid_tokens(self, block: Block, batch: int) -> Tensor | None:
        """Which tokens `[samples, tokens]` of a batch are no padding; None where there is none."""
        if block.group != "language":
            return None
        return torch.from_numpy(self.batches[batch].attention_mask).bool()

    def not_finite(self, what: str, values: Tensor, number: int, valid: Tensor | None) -> NumericalError:
        """The error that names the calibration sample, counted from 1, or all samples of a batch of packed patches."""
        first = sum(len(encoded.input_ids) for encoded in self.batches[:number]) + 1
        samples = f"samples {first} to {first + len(self.batches[number].input_ids) - 1}"
        if valid is not None:
            bad = ~torch.isfinite(values).all(-1).cpu() & valid
            samples = f"sample {first + int(bad.any(1).nonzero()[0])}"
        return NumericalError(
            f"{what} NaN or infinite on calibration {samples}.",
            "Run the sample on the model in its original precision: remove it if that answers, else get a sound model.",
        )

    def _narrow(self, block: Block) -> set[nn.Module]:
        """The layers of a block whose weights are bfloat16 in the model's files."""
        return {
            module
            for name, module in block.module.named_modules()
            if isinstance(module, nn.Linear) and self._dtypes.get(f"{block.name}.{name}.weight") == torch.bfloat16
        }

    def _forward(self, batch: int) -> None:
        with read_by_rows(self.loaded.model, self.loaded.stored):
            self.loaded.family.run_blocks(self.loaded.model, self.batches[batch], self._kept[batch])


def parameters_of(block: Block) -> int:
    """Number of parameters of a block.

    Example:
        >>> parameters_of(Block("layers.0", nn.Linear(4, 3), group="language"))
        15
    """
    return sum(parameter.numel() for parameter in block.module.parameters())


class _AllFed(Exception):  # noqa: N818 - control flow, not an error
    """Every collector has the inputs of its layer; the rest of the last block need not run."""


def _finite(values: Tensor, valid: Tensor | None) -> bool:
    """Whether values `[..., features]` are finite, except on padding, where `valid` `[...]` is False."""
    if bool(torch.isfinite(torch.stack((values.amin(), values.amax()))).all()):  # both hand NaN on
        return True
    return valid is not None and bool(torch.isfinite(values[valid.to(values.device)]).all())
