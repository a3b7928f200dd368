"""KV caches and their content. Of a prompt that begins with the same tokens and pictures, only the rest is read."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.prompts import Prompt
from qe_edge.system.errors import QEError


@dataclass(frozen=True)
class _Seen:
    """A picture in a cache: its key, the place of its first token, and the place behind its last one."""

    key: bytes
    start: int
    end: int


class Slot:
    """One cache of one row.

    Args:
        engine: The model.
        device: Held while the engine computes.

    Attributes:
        capacity: Tokens that fit.

    Example:
        >>> from contextlib import nullcontext  # doctest: +SKIP
        >>> from qe_edge.models.family import Sample  # doctest: +SKIP
        >>> from qe_edge.runtime.prompts import PromptReader  # doctest: +SKIP
        >>> engine = VisionLanguageEngine.load("out/demo/engines/cpu")  # doctest: +SKIP
        >>> prompt = PromptReader(engine, nullcontext()).encode(Sample(None, "hello"))  # doctest: +SKIP
        >>> slot = Slot(engine, nullcontext())  # doctest: +SKIP
        >>> logits = slot.read(prompt, [], *slot.shared(prompt))  # doctest: +SKIP
    """

    def __init__(self, engine: VisionLanguageEngine, device: AbstractContextManager[object]) -> None:
        self._engine, self._device = engine, device
        self._positions = np.zeros((1, 0), np.int64)
        self._step = 0
        self._begin(None)

    def _begin(self, capacity: int | None) -> None:
        self._cache = self._engine.new_cache(1, capacity)
        self.capacity = self._cache.capacity
        self._ids = np.zeros(self.capacity, np.int64)
        self._length = 0  # tokens that the cache is known to hold
        self._seen: list[_Seen] = []

    def make_room(self, tokens: int) -> None:
        """Take a larger cache, which is empty, where prompt and answer do not fit into this one.

        Raises:
            InputError: If they do not fit into the model's context.
            ResourceError: If memory does not suffice.
        """
        if tokens <= self.capacity:
            return
        larger = max(tokens, min(2 * self.capacity, self._engine.max_context))
        del self._cache  # both would not fit into a small device's memory
        try:
            self._begin(larger)
        except QEError:
            self._begin(None)
            raise

    def shared(self, prompt: Prompt) -> tuple[int, int]:
        """Number of tokens and pictures at the beginning of a prompt that the cache holds; never all of the tokens."""
        most = min(self._length, len(prompt.ids) - 1)
        differ = np.flatnonzero(self._ids[:most] != prompt.ids[:most])
        tokens = int(differ[0]) if len(differ) else most
        for number, seen in enumerate(self._seen):
            if seen.start < tokens and (seen.end > tokens or prompt.pictures[number : number + 1] != (seen.key,)):
                tokens = seen.start
        numbers = prompt.numbers[0]
        if tokens and numbers[tokens] == numbers[tokens - 1] > 1:  # these see each other, so they are read together
            tokens = int(np.flatnonzero(numbers == numbers[tokens])[0])
        if self._cache.states and tokens < self._length:  # they stand for all of the tokens, or are of no use
            tokens = 0
        return tokens, sum(seen.end <= tokens for seen in self._seen)

    def read(self, prompt: Prompt, features: Sequence[np.ndarray], tokens: int, pictures: int) -> np.ndarray:
        """Read a prompt.

        Args:
            prompt: The prompt.
            features: Features of every picture that the cache does not hold, `[tokens, width]`.
            tokens: Number of tokens that it holds, as `shared` says.
            pictures: Number of pictures that it holds, as `shared` says.

        Returns:
            Logits float32 `[vocabulary]` of the token that follows.
        """
        self._length, kept = 0, self._seen[:pictures]  # an error on the way leaves an empty cache
        self._cache.truncate(tokens)
        encoded, count = prompt.encoded, len(prompt.ids)
        mask = encoded.image_mask[:, tokens:]
        together = np.concatenate(features) if features else None
        embeds = self._engine.embed(encoded.input_ids[:, tokens:], together, mask if features else None)
        new = np.array([count - tokens])
        with self._device:
            logits = self._engine.extend(
                self._cache, embeds, prompt.positions[..., tokens:], new, numbers=prompt.numbers[:, tokens:]
            )
        self._ids[:count] = prompt.ids
        self._positions, self._step = prompt.positions, 0
        places = np.flatnonzero(encoded.image_mask[0, tokens:]) + tokens
        ends = np.cumsum([len(one) for one in features], dtype=np.int64)
        for key, one, end in zip(prompt.pictures[pictures:], features, ends.tolist(), strict=True):
            kept.append(_Seen(key, int(places[end - len(one)]), int(places[end - 1]) + 1))
        self._seen, self._length = kept, count
        row: np.ndarray = logits[0]
        return row

    def step(self, token: int) -> np.ndarray:
        """Feed a token of the answer; logits float32 `[vocabulary]` of the one that follows."""
        held, self._length = self._length, 0
        positions = self._engine.family.next_position_ids(self._positions, self._step)
        with self._device:
            logits = self._engine.extend(self._cache, self._engine.embed(np.array([[token]])), positions, np.array([1]))
        self._ids[held] = token
        self._length, self._step = held + 1, self._step + 1
        row: np.ndarray = logits[0]
        return row


class Rows:
    """A cache for several prompts at once, each of which is one row.

    Args:
        engine: The model.
        prompts: The prompts.
        room: Most tokens of an answer.

    Example:
        >>> from contextlib import nullcontext  # doctest: +SKIP
        >>> from qe_edge.models.family import Sample  # doctest: +SKIP
        >>> from qe_edge.runtime.prompts import PromptReader  # doctest: +SKIP
        >>> engine = VisionLanguageEngine.load("out/demo/engines/cpu")  # doctest: +SKIP
        >>> reader = PromptReader(engine, nullcontext())  # doctest: +SKIP
        >>> prompts = [reader.encode(Sample(None, text)) for text in ("hello", "red")]  # doctest: +SKIP
        >>> logits = Rows(engine, prompts, room=8).read([])  # doctest: +SKIP
    """

    def __init__(self, engine: VisionLanguageEngine, prompts: Sequence[Prompt], room: int) -> None:
        self._engine, self._prompts = engine, prompts
        longest = max(len(prompt.ids) for prompt in prompts)
        self._cache = engine.new_cache(len(prompts), longest + room)
        axes = prompts[0].positions.shape[:-2]
        self._positions = np.zeros((*axes, len(prompts), longest), np.int64)
        for row, prompt in enumerate(prompts):
            self._positions[..., row, : len(prompt.ids)] = prompt.positions[..., 0, :]
        self._step = 0

    def read(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Read all prompts.

        Args:
            features: Of every picture of every prompt, in order, `[tokens, width]`.

        Returns:
            Logits float32 `[rows, vocabulary]` of the tokens that follow.
        """
        shape = self._positions.shape[-2:]
        ids, numbers, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
        for row, prompt in enumerate(self._prompts):
            count = len(prompt.ids)
            ids[row, :count], mask[row, :count] = prompt.ids, prompt.encoded.image_mask[0]
            numbers[row, :count] = prompt.numbers[0]
        together = np.concatenate(features) if features else None
        embeds = self._engine.embed(ids, together, mask if features else None)
        lengths = np.array([len(prompt.ids) for prompt in self._prompts])
        return self._engine.extend(self._cache, embeds, self._positions, lengths, numbers=numbers)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Feed a token to every row; logits float32 `[rows, vocabulary]` of those that follow."""
        positions = self._engine.family.next_position_ids(self._positions, self._step)
        self._step += 1
        ones = np.ones(len(tokens), np.int64)
        return self._engine.extend(self._cache, self._engine.embed(np.array(tokens)[:, None]), positions, ones)
