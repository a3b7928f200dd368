"""What a user asks: pictures, a question, the turns before it, and what is known about the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from qe_edge.models.images import Picture
from qe_edge.models.texts import check_text
from qe_edge.system.errors import InputError

TEXT = "text"  # kind of a sample that is running text, not a question to be put into a chat template
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: Who speaks: "system", "user" or "assistant".
        text: The words.
        marks: Where in `text` pictures stand: for each the number of characters before it, in ascending order.

    Raises:
        InputError: If a role is unknown, a text no valid text, or a mark lies outside it.
    """

    role: Role
    text: str
    marks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise InputError(f"There is no role '{self.role}'.", f"Known: {', '.join(get_args(Role))}.")
        check_text(self.text, "A turn")
        _check_marks(self.marks, self.text)


@dataclass(frozen=True)
class Sample:
    """A picture with a question, and what is known about the answer; or running text; or a picture alone.

    Attributes:
        image: The picture: path of a file, PIL image, array or the bytes of a file (see `qe_edge.models.images`), or
            several of them in a sequence, in the order of their places in the conversation; None for a text-only
            sample. A path is kept as `Path`, several pictures as a tuple, one picture in a sequence as it is alone.
        question: The question or instruction; the text itself where `kind` is "text".
        answer: The reference answer, or None.
        kind: "open", "yesno" or "" when unknown; accuracy is reported apart. "text" for running text.
        topic: Free label, for example "color".
        answers: All right answers; an answer counts as right if it is one of them. `answer` is the first of them where
            it is not given, and is one of them where it is.
        earlier: Turns of the conversation before the question.
        marks: Where in `question` pictures stand, as in `Turn`. Pictures that neither `earlier` nor `marks` place stand
            before the question.
        origin: Where the sample came from, for messages; equality does not look at it.

    Raises:
        InputError: If one of these has a wrong type, or places more pictures than there are.

    Example:
        >>> Sample("a.png", "what color is it?", answers=("teal", "green")).answer
        'teal'
    """

    image: Picture | Sequence[Picture] | None
    question: str
    answer: str | None = None
    kind: str = ""
    topic: str = ""
    answers: tuple[str, ...] = ()
    earlier: tuple[Turn, ...] = ()
    marks: tuple[int, ...] = ()
    origin: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        pictures = _pictures(self.image)
        self._set("image", pictures[0] if len(pictures) == 1 else pictures or None)
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
        placed = sum(len(turn.marks) for turn in self.conversation)
        if placed != len(pictures):
            raise InputError(f"A sample places {placed} pictures and has {len(pictures)}.", "Correct its marks.")
        self._set("marks", tuple(mark for mark in self.marks if mark))  # the others stand before the question anyway

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures, in the order of their places."""
        return _pictures(self.image)

    @property
    def references(self) -> tuple[str, ...]:
        """All right answers."""
        return self.answers or (() if self.answer is None else (self.answer,))

    @property
    def conversation(self) -> tuple[Turn, ...]:
        """The earlier turns and the question as the last one, with every picture in its place."""
        placed = sum(len(turn.marks) for turn in self.earlier) + len(self.marks)
        unplaced = (0,) * (len(self.pictures) - placed)
        return (*self.earlier, Turn("user", self.question, (*unplaced, *self.marks)))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _pictures(image: Picture | Sequence[Picture] | None) -> tuple[Picture, ...]:
    if image is None:
        return ()
    parts = list(image) if isinstance(image, list | tuple) else [image]
    pictures: list[Picture] = []
    for part in parts:
        if not isinstance(part, Path | str | Image.Image | np.ndarray | bytes):
            raise InputError(
                f"A picture is a {type(part).__name__}.", "Give a path, a PIL image, an array, or the bytes of a file."
            )
        pictures.append(Path(part) if isinstance(part, str) else part)
    return tuple(pictures)


def _check_marks(marks: tuple[int, ...], text: str) -> None:
    numbers: tuple[object, ...] = marks
    if any(not isinstance(mark, int) or not 0 <= mark <= len(text) for mark in numbers) or list(marks) != sorted(marks):
        raise InputError(f"The marks {list(marks)} are no places in a text of {len(text)}.", "Correct the marks.")
