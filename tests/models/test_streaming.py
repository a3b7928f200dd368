"""Blocks that run one by one on recorded inputs put out what they put out inside the model, in both families."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from qe_edge.errors import ModelError
from qe_edge.models.family import Block, Encoded, Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.streaming import Streamer, chains_of, first_tensor, run_block


@contextmanager
def outputs_of(blocks: list[Block]) -> Iterator[dict[str, Tensor]]:
    """What every block puts out while the context is open."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        outputs[name] = first_tensor(output)

    def hook(name: str) -> object:
        return lambda _module, _inputs, output: keep(name, output)

    handles = [block.module.register_forward_hook(hook(block.name)) for block in blocks]  # type: ignore[arg-type]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def test_streamed_blocks_equal_the_plain_model(loaded: LoadedModel, samples: list[Sample]) -> None:
    # the second batch has no picture and never reaches the vision blocks
    parts = [samples[:2], [samples[2]], samples[3:]]
    batches = [loaded.family.encode(loaded.processor, part, answers=True) for part in parts]
    blocks = loaded.family.blocks(loaded.model)

    completed = 0

    def forward(encoded: Encoded) -> None:
        nonlocal completed
        with torch.no_grad():
            loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False)
        completed += 1

    plain = []
    for encoded in batches:
        with outputs_of(blocks) as outputs:
            forward(encoded)
        plain.append(outputs)

    chains = chains_of(blocks)
    assert [chain[0].group for chain in chains] == ["visual", "merger", "language"]
    streamer = Streamer(loaded.model, chains, len(batches), lambda index: forward(batches[index]))
    for index in range(len(chains)):
        chain = streamer.record(index)
        assert chain.batches == ([0, 1, 2] if chain.blocks[0].group == "language" else [0, 2])
        for position, block in enumerate(chain.blocks):
            assert len(chain.calls[position]) == len(chain.batches)
            chain.hidden = [
                run_block(block.module, hidden, call)
                for hidden, call in zip(chain.hidden, chain.calls[position], strict=True)
            ]
            for batch, hidden in zip(chain.batches, chain.hidden, strict=True):
                assert torch.equal(hidden, plain[batch][block.name]), block.name
        streamer.finish(chain)
    # no block runs before its turn: until then it may be in another precision
    assert completed == len(batches)
    assert not any("forward" in block.module.__dict__ for block in blocks)


def test_finished_chains_replay_their_outputs(loaded: LoadedModel, samples: list[Sample]) -> None:
    """A chain sees what the chain before it was given as output, not what its blocks would compute."""
    encoded = loaded.family.encode(loaded.processor, samples[:1])
    inputs = loaded.family.torch_inputs(encoded)
    chains = chains_of(loaded.family.blocks(loaded.model))
    streamer = Streamer(loaded.model, chains, 1, lambda _: loaded.model(**inputs, use_cache=False))
    visual = streamer.record(0)
    assert visual.hidden[0].abs().max() > 0
    visual.hidden = [torch.zeros_like(visual.hidden[0])]
    streamer.finish(visual)
    merger = streamer.record(1)
    # zeros pass the last norm as its bias: all patches alike
    patches = merger.hidden[0].reshape(-1, visual.hidden[0].shape[-1])
    assert torch.equal(patches, patches[:1].expand_as(patches))


def test_a_block_that_returns_a_tuple_is_refused() -> None:
    class Old(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            return (hidden_states,)

    from qe_edge.streaming import BlockCall

    with pytest.raises(ModelError, match="tuple"):
        run_block(Old(), torch.zeros(1, 2, 3), BlockCall((), {}))
