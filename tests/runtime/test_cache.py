"""A cache that is kept: tokens in pieces, of rows of different lengths, forgotten and read again."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import numpy as np
import pytest

from qe_edge.models.family import Sample
from qe_edge.runtime.cache import KVCache, right_places, take_tokens
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.slots import Slot
from qe_edge.system.errors import InputError, ResourceError
from tests.conftest import Exports

PROMPTS = [Sample(None, "is there a red shape in the image? " * 2), Sample(None, "why?")]


@pytest.fixture(scope="module")
def engine(exports: Exports) -> VisionLanguageEngine:
    return VisionLanguageEngine.load(exports("rtn", "w4a16").onnx, threads=1)


class Prompt:
    """Two prompts as right-padded rows."""

    def __init__(self, engine: VisionLanguageEngine) -> None:
        encoded = engine.encode(PROMPTS)
        places = right_places(encoded.attention_mask)
        self.lengths = encoded.attention_mask.sum(1)
        self.positions = take_tokens(engine.family.position_ids(encoded), places, 1)
        self.embeds = take_tokens(engine.embed(encoded.input_ids), places, 0)

    def piece(self, start: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of every row from `start` on, what `extend` takes."""
        places = np.minimum(start[:, None] + np.arange(lengths.max()), self.embeds.shape[1] - 1)
        return take_tokens(self.embeds, places, 0), take_tokens(self.positions, places, 1), lengths


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("first", [(5, 5), (9, 2), (1, 4)], ids=str)
def test_pieces_give_what_the_whole_gives(engine: VisionLanguageEngine, first: tuple[int, int]) -> None:
    prompt = Prompt(engine)
    wanted = engine.extend(engine.new_cache(2, 64), prompt.embeds, prompt.positions, prompt.lengths, logits="all")
    cache = engine.new_cache(2, 64)
    for array in cache.past.values():
        array[:] = np.nan  # what no token has written is not read
    start = np.array(first)
    found = engine.extend(cache, *prompt.piece(np.zeros(2, int), start), logits="all")
    assert all(close(found[row, :count], wanted[row, :count]) for row, count in enumerate(start))
    rest = prompt.lengths - start
    found = engine.extend(cache, *prompt.piece(start, rest), logits="all")
    for row, (before, count) in enumerate(zip(start, rest, strict=True)):
        assert close(found[row, :count], wanted[row, before : before + count])
    assert cache.lengths.tolist() == prompt.lengths.tolist()
    assert cache.mask.sum(1).tolist() == prompt.lengths.tolist()


def test_what_is_forgotten_leaves_no_trace(engine: VisionLanguageEngine) -> None:
    prompt = Prompt(engine)
    cache = engine.new_cache(2, 64)
    wanted = engine.extend(cache, prompt.embeds, prompt.positions, prompt.lengths)
    three = np.array([3, 3])
    cache.truncate(3)
    assert cache.lengths.tolist() == [3, 3]
    engine.extend(cache, *prompt.piece(three + 2, np.array([2, 1])))
    cache.truncate(3)
    assert close(engine.extend(cache, *prompt.piece(three, prompt.lengths - 3)), wanted)
    cache.truncate(0)
    assert close(engine.extend(cache, prompt.embeds, prompt.positions, prompt.lengths), wanted)


def test_a_cache_is_written_where_it_lies(engine: VisionLanguageEngine) -> None:
    prompt = Prompt(engine)
    cache = engine.new_cache(2, 48)
    kv = engine.manifest.kv
    assert cache.nbytes == 2 * kv.layers * kv.heads * kv.head_dim * 2 * 48 * 4
    addresses = {name: array.ctypes.data for name, array in cache.past.items()}
    engine.extend(cache, prompt.embeds, prompt.positions, prompt.lengths)
    assert {name: array.ctypes.data for name, array in cache.past.items()} == addresses
    key = cache.past["past_key_values.0.key"]
    assert key[1, :, : prompt.lengths[1]].any()
    assert not key[:, :, prompt.lengths.max() :].any()


def test_what_does_not_fit(engine: VisionLanguageEngine) -> None:
    prompt = Prompt(engine)
    with pytest.raises(InputError, match="together at most 16 fit"):
        engine.extend(engine.new_cache(2, 16), prompt.embeds, prompt.positions, prompt.lengths)
    with pytest.raises(InputError, match="A cache of 100000 tokens cannot be had"):
        engine.new_cache(1, 100000)
    with pytest.raises(InputError, match="A cache of 0 rows"):
        engine.new_cache(0)
    with pytest.raises(InputError, match="do not fit a cache of 1 rows"):
        engine.extend(engine.new_cache(1), prompt.embeds, prompt.positions, prompt.lengths)
    with pytest.raises(InputError, match="A row has 0 to"):
        engine.extend(engine.new_cache(2), prompt.embeds, prompt.positions, np.array([0, 3]))


def test_a_smaller_context_is_obeyed(exports: Exports) -> None:
    folder = exports("rtn", "w4a16").onnx
    engine = VisionLanguageEngine.load(folder, threads=1, max_context=32)
    assert engine.new_cache().capacity == 32
    with pytest.raises(InputError, match="together at most 32 fit"):
        engine.generate(PROMPTS[:1], 30)
    assert engine.generate(PROMPTS[:1], 2) == VisionLanguageEngine.load(folder, threads=1).generate(PROMPTS[:1], 2)
    with pytest.raises(InputError, match="attends to 2 to 1024 tokens, 2000 are asked for"):
        VisionLanguageEngine.load(folder, max_context=2000)


def test_a_slot_gives_its_cache_back_before_it_takes_a_larger_one(
    engine: VisionLanguageEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot, make = Slot(engine, nullcontext()), engine.new_cache
    first, small = weakref.ref(slot._cache), slot.capacity
    held = []

    def too_large(batch: int, capacity: int | None) -> object:
        held.append(first())
        if capacity is not None:
            raise ResourceError("No memory.", "Ask for less.")
        return make(batch, capacity)

    monkeypatch.setattr(engine, "new_cache", too_large)
    with pytest.raises(ResourceError):
        slot.make_room(small + 1)
    assert held == [None, None]
    assert slot.capacity == small


def test_caches_in_turn_are_each_their_own_and_go_when_they_are_not_used(engine: VisionLanguageEngine) -> None:
    """Arrays stay bound from call to call, which must neither mix them up nor keep them."""
    prompt = Prompt(engine)
    once = np.array([1, 1])

    def read(cache: KVCache, token: int) -> np.ndarray:
        start = np.full(2, token)
        return engine.extend(cache, *prompt.piece(start, once))

    alone = engine.new_cache(2, 64)
    wanted = [read(alone, token) for token in range(4)]
    first, second = engine.new_cache(2, 64), engine.new_cache(2, 64)
    found = [(read(first, token), read(second, token)) for token in range(4)]
    assert all(
        np.array_equal(one, right) and np.array_equal(other, right)
        for (one, other), right in zip(found, wanted, strict=True)
    )
    kept = weakref.ref(next(iter(second.past.values())))
    del second
    assert kept() is None
    assert np.array_equal(read(first, 4), read(alone, 4))
