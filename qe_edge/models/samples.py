"""What a user asks: pictures, a question, the turns before it, and what is known about the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from qe_edge.models.images import Picture
from qe_edge.models.robot import as_actions, as_state
from qe_edge.models.texts import check_text
from qe_edge.models.videos import Video
from qe_edge.system.errors import InputError

TEXT = "text"  # kind of a sample that is running text, not a question to be put into a chat template
Role = Literal["system", "user", "assistant"]
Shown = Picture | Video


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: Who speaks: "system", "user" or "assistant".
        text: The words.
        marks: Where in `text` pictures and videos stand: for each the number of characters before it, in ascending
            order.
        videos: Which of the marks are a video's, by their numbers. A sample fills it in.

    Raises:
        InputError: If a role is unknown, a text no valid text, or a mark lies outside it.
    """

    role: Role
    text: str
    marks: tuple[int, ...] = ()
    videos: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise InputError(f"There is no role '{self.role}'.", f"Known: {', '.join(get_args(Role))}.")
        check_text(self.text, "A turn")
        _check_marks(self.marks, self.text)


@dataclass(frozen=True)
class Sample:
    """A picture or video with a question, and what is known about the answer; or running text; or a picture alone.

    Attributes:
        image: The picture: path of a file, PIL image, array or the bytes of a file (see `qe_edge.models.images`); a
            `qe_edge.models.videos.Video`; or several of both in a sequence, in the order of their places in the
            conversation; None for a text-only sample. A path is kept as `Path`, several in a sequence as a tuple, one
            in a sequence as it is alone.
        question: The question or instruction; the text itself where `kind` is "text".
        answer: The reference answer, or None.
        kind: "open", "yesno" or "" when unknown; accuracy is reported apart. "text" for running text.
        topic: Free label, for example "color".
        answers: All right answers; an answer counts as right if it is one of them. `answer` is the first of them where
            it is not given, and is one of them where it is.
        earlier: Turns of the conversation before the question.
        marks: Where in `question` pictures and videos stand, as in `Turn`. Those that neither `earlier` nor `marks`
            place stand before the question.
        origin: Where the sample came from, for messages; equality does not look at it.
        state: The robot's state in its own numbers, for models that act; None for others.
        actions: What the robot did next, an action after the other, in its own numbers; None where that is not known.

    Raises:
        InputError: If one of these has a wrong type, or places more pictures than there are.

    Example:
        >>> Sample("a.png", "what color is it?", answers=("teal", "green")).answer
        'teal'
    """

    image: Shown | Sequence[Shown] | None
    question: str
    answer: str | None = None
    kind: str = ""
    topic: str = ""
    answers: tuple[str, ...] = ()
    earlier: tuple[Turn, ...] = ()
    marks: tuple[int, ...] = ()
    origin: str = field(default="", compare=False)
    state: Sequence[float] | None = None
    actions: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        media = _media(self.image)
        self._set("image", media[0] if len(media) == 1 else media or None)
        check_text(self.question, "A question")
        for name in ("kind", "topic", "origin"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"The {name} of a sample is no text.", "Give a str.")
        answers: object = self.answers
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise InputError("The answers of a sample are no list of texts.", "Give one text as 'answer'.")
        for answer in (*self.answers, *([] if self.answer is None else [self.answer])):
            check_text(answer, "An answer")
        first = [] if self.answer is None else [self.answer]
        right = tuple(dict.fromkeys([*first, *self.answers]))
        self._set("answer", right[0] if right else None)
        self._set("answers", right if len(right) > 1 else ())
        self._set("earlier", tuple(self.earlier))
        self._set("marks", tuple(self.marks))
        _check_marks(self.marks, self.question)
        placed = sum(len(turn.marks) for turn in (*self.earlier, self._last))
        if placed != len(media):
            raise InputError(f"A sample places {placed} pictures and has {len(media)}.", "Correct its marks.")
        self._set("marks", tuple(mark for mark in self.marks if mark))  # the others stand before the question anyway
        self._set("state", None if self.state is None else as_state(self.state))
        self._set("actions", None if self.actions is None else as_actions(self.actions))

    @property
    def media(self) -> tuple[Shown, ...]:
        """All pictures and videos, in the order of their places."""
        return _media(self.image)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures alone."""
        return tuple(shown for shown in self.media if not isinstance(shown, Video))

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos alone."""
        return tuple(shown for shown in self.media if isinstance(shown, Video))

    @property
    def references(self) -> tuple[str, ...]:
        """All right answers."""
        return self.answers or (() if self.answer is None else (self.answer,))

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """The earlier turns and the question as the last one, with every picture and video in its place."""
        waiting = iter(self.media)
        turns: list[Turn] = []
        for turn in (*self.earlier, self._last):
            shown = [next(waiting, None) for _ in turn.marks]
            videos = tuple(number for number, one in enumerate(shown) if isinstance(one, Video))
            turns.append(turn if turn.videos == videos else replace(turn, videos=videos))
        return tuple(turns)

    @property
    def _last(self) -> Turn:
        placed = sum(len(turn.marks) for turn in self.earlier) + len(self.marks)
        unplaced = (0,) * (len(self.media) - placed)
        return Turn("user", self.question, (*unplaced, *self.marks))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _media(image: Shown | Sequence[Shown] | None) -> tuple[Shown, ...]:
    if image is None:
        return ()
    parts = list(image) if isinstance(image, list | tuple) else [image]
    media: list[Shown] = []
    for part in parts:
        if not isinstance(part, Path | str | Image.Image | np.ndarray | bytes | Video):
            raise InputError(
                f"A picture is a {type(part).__name__}.",
                "Give a path, a PIL image, an array, the bytes of a file, or a Video.",
            )
        media.append(Path(part) if isinstance(part, str) else part)
    return tuple(media)


def _check_marks(marks: tuple[int, ...], text: str) -> None:
    numbers: tuple[object, ...] = marks
    if any(not isinstance(mark, int) or not 0 <= mark <= len(text) for mark in numbers) or list(marks) != sorted(marks):
        raise InputError(f"The marks {list(marks)} are no places in a text of {len(text)}.", "Correct the marks.")
