"""Questions in, answers out: chat messages with pictures, piece by piece if wanted, several at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, overload

import numpy as np

from qe_edge.models.family import Sample
from qe_edge.models.images import Picture
from qe_edge.models.messages import read_beside
from qe_edge.models.videos import Video
from qe_edge.runtime.answer_options import AnswerOptions, answer_options
from qe_edge.runtime.answer_stream import AnswerStream
from qe_edge.runtime.answering import Answering
from qe_edge.runtime.answers import Answer
from qe_edge.runtime.cache_tensors import is_state, sizes_of
from qe_edge.runtime.conversation import Conversation
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.sampling import check_count
from qe_edge.system.errors import InputError, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from qe_edge.runtime.answer_options import Options

MAX_SLOTS = 1024
ROWS = 8  # prompts of a list that are answered side by side

Question = str | Sequence[Mapping[str, Any]] | Sample  # a text, chat messages, or what either is read into
Pictures = Picture | Video | Sequence[Picture | Video]


class Pipeline:
    """Answers questions about pictures with a deployed model.

    A prompt that begins as an earlier one did is read from where they differ, and a picture that was seen before is
    not encoded again. Threads may share a pipeline: `slots` answers run at once, each with a KV cache of its own, and
    the others wait in the order in which they came.

    Args:
        engine: The model.
        slots: Number of answers that run at once.

    Attributes:
        engine: The model.

    Raises:
        InputError: If there cannot be so many slots.

    Example:
        `Pipeline.from_dir("onnx")("What is this?", "picture.png").text`, or piece by piece:
        `for piece in pipeline("What is this?", "picture.png", stream=True): print(piece.text, end="")`.
    """

    def __init__(self, engine: VisionLanguageEngine, *, slots: int = 1) -> None:
        check_count("slots", slots, 1)
        if slots > MAX_SLOTS:
            raise InputError(f"{slots} slots are too many.", f"Choose at most {MAX_SLOTS}.")
        self.engine = engine
        self._answering = Answering(engine, slots)

    @classmethod
    def from_dir(
        cls, folder: str | Path, *, threads: int | None = None, max_context: int | None = None, slots: int = 1
    ) -> Pipeline:
        """Open an ONNX folder (`qe-edge export`) or an engine folder (`qe-edge build`).

        Args:
            folder: The folder.
            threads: For ONNX Runtime: number of threads, None for all cores.
            max_context: Most tokens of a prompt and its answer; None for the engine's default.
            slots: Number of answers that run at once; each has a KV cache for `max_context` tokens.

        Raises:
            InputError: If there is no such number of threads, tokens or slots.
            ArtifactError: If the folder is missing or damaged.
            TargetError: If this machine cannot run its engines.
        """
        return cls(VisionLanguageEngine.load(folder, threads=threads, max_context=max_context), slots=slots)

    @overload
    def __call__(
        self, prompt: Question, images: Pictures | None = None, *, stream: Literal[True], **options: Unpack[Options]
    ) -> AnswerStream: ...

    @overload
    def __call__(
        self,
        prompt: Question,
        images: Pictures | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> Answer: ...

    @overload
    def __call__(
        self,
        prompt: list[str] | list[Sample] | list[list[dict[str, Any]]],
        images: Sequence[Pictures | None] | None = None,
        *,
        stream: Literal[False] = False,
        **options: Unpack[Options],
    ) -> list[Answer]: ...

    def __call__(
        self,
        prompt: object,
        images: object = None,
        *,
        stream: bool = False,
        **options: Unpack[Options],
    ) -> Answer | list[Answer] | AnswerStream:
        """Answer a question, or each question of a list.

        Args:
            prompt: A question; chat messages, as `qe_edge.models.messages.read_messages` reads them; or a list of
                either, which are answered side by side.
            images: Pictures that the messages do not name themselves: paths, PIL images, arrays `[height, width, 3]`
                or bytes of files; and `Video`s; one or several. For a list of prompts, a list with those of each.
            stream: Whether to return an iterator of pieces.
            **options: `max_new_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`, `seed` and
                `stop`, as `qe_edge.runtime.answer_options.answer_options` describes them.

        Returns:
            The answer, a list of answers, or an iterator of pieces.

        Raises:
            InputError: If a question, a picture or an option cannot be used, or there is no room for an answer.
            NumericalError: If logits are not finite.
        """
        chosen = answer_options(self.engine.manifest.generation, options)
        if _is_several(prompt):
            if stream:
                raise InputError("Answers to several prompts do not come in pieces.", "Ask them one by one.")
            return self._answer_all(prompt, images, chosen)
        found = self._answering.stream(_sample(prompt, images), chosen)
        return found if stream else found.answer()

    def _answer_all(self, prompts: Sequence[object], images: object, options: AnswerOptions) -> list[Answer]:
        each = [None] * len(prompts) if images is None else images
        if not isinstance(each, list | tuple) or len(each) != len(prompts):
            raise InputError(
                f"There are {len(prompts)} prompts, and no list of as many pictures.",
                "Give one entry for each prompt: a picture, a list of them, or None.",
            )
        samples = [_sample(*asked) for asked in zip(prompts, each, strict=True)]
        limits = self.engine.limits
        rows = ROWS if limits is None or limits.batch is None else min(ROWS, limits.batch)
        answers: list[Answer] = []
        for start in range(0, len(samples), rows):
            answers += self._answering.batch(samples[start : start + rows], options)
        return answers

    @property
    def slots(self) -> int:
        """Number of answers that run at once."""
        return self._answering.turns.count

    @property
    def slot_tokens(self) -> int:
        """Tokens that fit into the KV cache of a slot; a longer prompt gets a larger one, if the context allows it."""
        return self.engine.room(1, None)

    @property
    def slot_bytes(self) -> int:
        """Memory of such a cache, which is taken when a slot is used first."""
        manifest, found = self.engine.manifest, 0
        for spec in manifest.cache:
            shape = sizes_of(spec, 1, self.slot_tokens)
            copies = 1 if manifest.kv.in_place and not is_state(spec.name) else 2
            found += copies * int(np.prod(shape)) * np.dtype(spec.dtype).itemsize
        return found

    @property
    def remembered_bytes(self) -> int:
        """Memory of pictures that need not be encoded again."""
        return self._answering.remembered_bytes

    def conversation(self, system: str | None = None) -> Conversation:
        """A conversation with a KV cache of its own, which reads each turn once.

        Args:
            system: System prompt; None for the one of the chat template.
        """
        return Conversation(self._answering, system)


def _is_several(prompt: object) -> TypeGuard[Sequence[object]]:
    """Whether it is a list of prompts and not one prompt: one in chat messages is a list of tables."""
    if not isinstance(prompt, list | tuple):
        return False
    if not prompt:
        raise InputError("There is nothing to answer.", "Pass at least one question.")
    return not isinstance(prompt[0], dict)


def _sample(prompt: object, images: object) -> Sample:
    if isinstance(prompt, Sample):
        if images is not None:
            raise InputError("A sample has its pictures itself.", "Leave images out.")
        return prompt
    if not isinstance(prompt, str | list | tuple):
        raise InputError(f"{shown(prompt)} is no prompt.", "Give a text, or a list of chat messages.")
    return read_beside(prompt, images)
