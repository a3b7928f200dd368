"""Several turns on one KV cache."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from qe_edge.models.messages import read_beside
from qe_edge.models.samples import Sample, Shown, Turn
from qe_edge.runtime.answer_options import answer_options
from qe_edge.runtime.answer_stream import AnswerStream
from qe_edge.runtime.answering import Answering
from qe_edge.runtime.answers import Answer
from qe_edge.runtime.slots import Slot
from qe_edge.system.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qe_edge.runtime.answer_options import Options


class Conversation:
    """A conversation, which remembers its turns. The model reads only the new part of each prompt.

    A turn counts when its answer has ended, also by cancelling. A turn whose answer is closed before, or fails, is
    forgotten. The cache is held until `close`, or the end of `with`.

    Args:
        answering: Makes the answers.
        system: System prompt; None for the one of the chat template.

    Attributes:
        turns: The turns so far.

    Example:
        `with pipeline.conversation() as chat: chat("What is this?", "picture.png"); chat("What color is it?").text`
    """

    def __init__(self, answering: Answering, system: str | None = None) -> None:
        self.turns: tuple[Turn, ...] = () if system is None else (Turn("system", system),)
        self._answering = answering
        self._shown: tuple[Shown, ...] = ()
        self._slot: Slot | None = answering.new_slot()
        self._answer: weakref.ref[AnswerStream] | None = None

    @overload
    def __call__(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Shown | Sequence[Shown] | None = None,
        *,
        stream: Literal[True],
        **options: Unpack[Options],
    ) -> AnswerStream: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Shown | Sequence[Shown] | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Answer: ...

    def __call__(
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        images: Shown | Sequence[Shown] | None = None,
        *,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | AnswerStream:
        """Say something, and get the answer.

        Args:
            prompt: A text, or a list of parts as the content of a chat message.
            images: Pictures and videos that come with it, as for `Pipeline`.
            stream: Whether to return an iterator of pieces.
            **options: As for `Pipeline`.

        Raises:
            InputError: If it cannot be used, the conversation is closed, or its last answer has not ended.
        """
        slot = self._slot
        if slot is None:
            raise InputError("This conversation is closed.", "Begin another one.")
        chosen = answer_options(self._answering.engine.manifest.generation, options)
        said = read_beside([{"role": "user", "content": prompt}], images)
        (turn,) = said.conversation
        sample = Sample((*self._shown, *said.media), turn.text, earlier=self.turns, marks=turn.marks)
        earlier = None if self._answer is None else self._answer()
        if earlier is not None and not earlier.ended:
            raise InputError("The last answer of this conversation has not ended.", "Read it to its end or close it.")
        found = self._answering.stream(sample, chosen, slot, lambda answer: self._keep(sample, answer))
        self._answer = weakref.ref(found)
        return found if stream else found.answer()

    def close(self) -> None:
        """Give back the memory of the cache; nothing more can be said."""
        self._slot = None

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _keep(self, sample: Sample, answer: Answer) -> None:
        if answer.finish_reason == "cancelled" and not answer.text:
            return
        self.turns = (*sample.conversation, Turn("assistant", answer.text))
        self._shown = sample.media
