"""Makes answers: a turn, a cache, the prompt, then token after token."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from qe_edge.models.family import Sample
from qe_edge.runtime.answer_options import AnswerOptions
from qe_edge.runtime.answer_stream import AnswerStream
from qe_edge.runtime.answers import Answer, Piece, Timings
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.generation import check_context
from qe_edge.runtime.limits import check_limits
from qe_edge.runtime.prompts import Prompt, PromptReader
from qe_edge.runtime.slots import Rows, Slot
from qe_edge.runtime.turns import Turns
from qe_edge.runtime.writer import AnswerWriter


class Clock:
    """Times the parts of an answer, in seconds.

    Example:
        >>> clock = Clock()
        >>> clock.note("prefill")
        >>> clock.token()
        >>> timings = clock.timings(tokens=1)
        >>> timings.answer_tokens, 0 <= timings.prefill <= timings.first_token
        (1, True)
    """

    def __init__(self) -> None:
        self._start = self._mark = time.perf_counter()
        self._first: float | None = None
        self._parts: dict[str, float] = {}
        self.prompt_tokens = self.reused_tokens = 0

    def note(self, part: str, *, without: float = 0.0) -> None:
        """Count the time since the last note for `part`, less `without` seconds."""
        now = time.perf_counter()
        self._parts[part] = now - self._mark - without
        self._mark = now

    def set(self, part: str, seconds: float) -> None:
        """A part that was timed elsewhere."""
        self._parts[part] = seconds

    def token(self) -> None:
        """A token was chosen."""
        if self._first is None:
            self._first = time.perf_counter()

    def timings(self, tokens: int) -> Timings:
        """All of it, at the end of an answer."""
        now = time.perf_counter()
        first = self._first or now
        names = ("waited", "preprocessing", "visual", "merger", "prefill")
        parts = {name: self._parts.get(name, 0.0) for name in names}
        return Timings(
            **parts,
            first_token=first - self._start,
            decode=now - first,
            prompt_tokens=self.prompt_tokens,
            reused_tokens=self.reused_tokens,
            answer_tokens=tokens,
        )


class Answering:
    """Makes answers with one engine.

    Args:
        engine: The model.
        slots: How many answers are made at once.

    Attributes:
        engine: The model.
        turns: The order in which answers compute.

    Example:
        >>> from qe_edge.runtime.answer_options import answer_options  # doctest: +SKIP
        >>> answering = Answering(VisionLanguageEngine.load("out/demo/engines/cpu"), slots=2)  # doctest: +SKIP
        >>> options = answer_options(answering.engine.manifest.generation, {"max_new_tokens": 8})  # doctest: +SKIP
        >>> answering.stream(Sample("picture.png", "what is it?"), options).answer().text  # doctest: +SKIP
    """

    def __init__(self, engine: VisionLanguageEngine, slots: int) -> None:
        self.engine = engine
        self.turns = Turns(slots)
        # one thread at a time where a backend has one set of buffers
        self._device: AbstractContextManager[object] = nullcontext() if engine.limits is None else threading.Lock()
        self._reader = PromptReader(engine, self._device)
        self._decoder = copy.deepcopy(engine.processor.tokenizer)  # encoding changes a tokenizer that others may use
        self._choosing = threading.RLock()  # a stream that the garbage collector closes gives its cache back
        self._free: list[Slot] = []  # the last used one last
        self._made = 0

    @property
    def remembered_bytes(self) -> int:
        """Memory of pictures that need not be encoded again."""
        return self._reader.remembered_bytes

    def new_slot(self) -> Slot:
        """A cache of its own."""
        return Slot(self.engine, self._device)

    def stream(
        self,
        sample: Sample,
        options: AnswerOptions,
        slot: Slot | None = None,
        done: Callable[[Answer], None] | None = None,
    ) -> AnswerStream:
        """The answer to a sample, piece by piece; see `pieces`. `done` is called with the whole one at its end."""
        return AnswerStream(lambda cancelled: self.pieces(sample, options, cancelled, slot), self.turns.wake, done)

    def pieces(
        self, sample: Sample, options: AnswerOptions, cancelled: threading.Event, slot: Slot | None = None
    ) -> Iterator[Piece]:
        """Make one answer.

        Args:
            sample: The question.
            options: Options of the answer.
            cancelled: Event that ends the answer before the next token.
            slot: The cache to use; None for the one that has most of the prompt.

        Raises:
            InputError: If the prompt cannot be read or does not fit.
            NumericalError: If logits are not finite.
        """
        clock = Clock()
        if not self.turns.enter(cancelled, cancelled.is_set):
            clock.note("waited")
            yield Piece("", (), "cancelled", clock.timings(0))
            return
        clock.note("waited")
        taken: Slot | None = None
        try:
            prompt = self._reader.encode(sample)
            clock.note("preprocessing")
            if slot is None:
                slot = taken = self._take(prompt)
            yield from self._write(sample, prompt, options, cancelled, slot, clock)
        finally:
            if taken is not None:
                with self._choosing:
                    self._free.append(taken)
            self.turns.leave(cancelled)

    def _write(
        self,
        sample: Sample,
        prompt: Prompt,
        options: AnswerOptions,
        cancelled: threading.Event,
        slot: Slot,
        clock: Clock,
    ) -> Iterator[Piece]:
        room = self._room([prompt], options)
        slot.make_room(len(prompt.ids) + (1 if options.max_new_tokens is None else room))
        room = min(room, slot.capacity - len(prompt.ids))
        clock.prompt_tokens = len(prompt.ids)
        clock.reused_tokens, pictures = slot.shared(prompt)
        features, visual, merger = self._reader.features(prompt, sample, pictures)
        clock.set("visual", visual)
        clock.set("merger", merger)
        clock.note("features")
        writer = AnswerWriter(prompt.ids, room, options, self._decoder)
        logits: np.ndarray | None = None
        shown = 0
        ended = False
        while not ended:
            self.turns.work(cancelled)
            if cancelled.is_set():
                text = writer.end("cancelled")
            else:
                if logits is None:
                    logits = slot.read(prompt, features, clock.reused_tokens, pictures)
                    clock.note("prefill")
                else:
                    logits = slot.step(writer.ids[-1])
                text = writer.take(logits)
                clock.token()
            ended = writer.ended
            if text or ended:
                ids, shown = tuple(writer.ids[shown:]), len(writer.ids)
                timings = clock.timings(shown) if ended else None
                yield Piece(text, ids, writer.finish_reason, timings)

    def batch(self, samples: Sequence[Sample], options: AnswerOptions) -> list[Answer]:
        """Make several answers side by side; each is the same as alone.

        Raises:
            InputError: If a prompt cannot be read or does not fit.
            NumericalError: If logits are not finite.
        """
        clock, who = Clock(), object()
        self.turns.enter(who, lambda: False)
        try:
            clock.note("waited")
            prompts = [self._reader.encode(sample) for sample in samples]
            clock.note("preprocessing")
            room = self._room(prompts, options)
            found = [self._reader.features(*asked) for asked in zip(prompts, samples, strict=True)]
            clock.set("visual", sum(visual for _, visual, _ in found))
            clock.set("merger", sum(merger for _, _, merger in found))
            clock.note("features")
            rows = Rows(self.engine, prompts, room)
            with self._device:
                logits = rows.read([one for features, _, _ in found for one in features])
            clock.note("prefill")
            writers = [AnswerWriter(prompt.ids, room, options, self._decoder) for prompt in prompts]
            texts = ["" for _ in writers]
            while True:
                for row, writer in enumerate(writers):
                    if not writer.ended:
                        texts[row] += writer.take(logits[row])
                clock.token()
                if all(writer.ended for writer in writers):
                    break
                pad = self.engine.manifest.pad_token_id
                with self._device:
                    logits = rows.step([pad if writer.ended else writer.ids[-1] for writer in writers])
        finally:
            self.turns.leave(who)
        answers = []
        for text, writer, prompt in zip(texts, writers, prompts, strict=True):
            clock.prompt_tokens = len(prompt.ids)
            timings = clock.timings(len(writer.ids))
            answers.append(Answer(text, tuple(writer.ids), writer.finish_reason or "length", timings))
        return answers

    def _take(self, prompt: Prompt) -> Slot:
        """The free cache that holds most of a prompt, if that is half of it; else one that was not used yet."""
        with self._choosing:
            best = max(self._free, key=lambda slot: slot.shared(prompt)[0], default=None)
            little = best is None or 2 * best.shared(prompt)[0] < len(prompt.ids)  # as a template's first tokens are
            if best is None or (little and self._made < self.turns.count):
                slot = self.new_slot()
                self._made += 1
                return slot
            self._free.remove(best)
            return best

    def _room(self, prompts: Sequence[Prompt], options: AnswerOptions) -> int:
        """Most tokens of the answers.

        Raises:
            InputError: If there is no room for one, or not for as many as were asked for.
        """
        longest = max(len(prompt.ids) for prompt in prompts)
        wanted, context = options.max_new_tokens, self.engine.max_context
        check_context(longest, 1 if wanted is None else wanted, context)
        room = min(self.engine.room(longest + 1, None), context) - longest if wanted is None else wanted
        if self.engine.limits is not None:
            for prompt in prompts:
                check_limits(self.engine.limits, prompt.encoded, room)
        return room
