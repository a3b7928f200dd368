"""Chat messages as transformers and OpenAI write them, read into a `Sample`: every part is understood or refused."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from typing import Any

from qe_edge.models.images import Picture
from qe_edge.models.samples import Role, Sample, Turn
from qe_edge.models.texts import shortened
from qe_edge.system.errors import InputError

ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
SOURCES = ("image", "path", "url", "image_url")  # keys that name a part's picture
ADDRESS = re.compile(r"^(\w[\w+.-]+):", re.ASCII)  # of a URL; one letter is a drive of Windows
MAX_TURNS = 10_000

Marks = tuple[int, ...]  # where pictures stand in a text
Spoken = tuple[Role, str, Marks]  # a turn
ReadText = Callable[[str], tuple[str, Marks]]
OpenSource = Callable[[Any], Picture]


def plain_text(text: str) -> tuple[str, Marks]:
    """Return a text and no places: no word in it stands for a picture.

    Example:
        >>> plain_text("is it red?")
        ('is it red?', ())
    """
    return text, ()


def local_picture(source: Any) -> Picture:  # noqa: ANN401 - whatever a message holds
    """The picture that a message names: a path, the bytes of a file, a PIL image, an array, or a `data:` address.

    Raises:
        InputError: If it is another address.

    Example:
        >>> local_picture("cat.png")
        'cat.png'
        >>> local_picture("https://example.org/cat.png")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: The picture 'https://example.org/cat.png' is an address, not a file.
        Download the picture first.
    """
    if not isinstance(source, str):
        picture: Picture = source  # a sample checks its type
        return picture
    address = ADDRESS.match(source)
    if address is None:
        return source
    if address.group(1).lower() == "data":
        return data_bytes(source)
    remedy = "Write the path without 'file:'." if address.group(1).lower() == "file" else "Download the picture first."
    raise InputError(f"The picture '{shortened(source)}' is an address, not a file.", remedy)


def data_bytes(address: str) -> bytes:
    r"""The content of a `data:` address in base64.

    Raises:
        InputError: If it is written in another way, or damaged.

    Example:
        >>> data_bytes("data:image/png;base64,AAEC")
        b'\x00\x01\x02'
    """
    head, comma, content = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise InputError(
            f"A picture's address '{shortened(head)}' is not in base64.", "Write 'data:image/png;base64,' and the file."
        )
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("A picture's base64 is damaged.", "Encode the file again.") from error


def read_messages(
    messages: Any,  # noqa: ANN401 - from a user
    images: Sequence[Picture] = (),
    *,
    open_source: OpenSource = local_picture,
) -> Sample:
    """Read a prompt or chat messages as one sample.

    Args:
        messages: A prompt, or a list of `{"role": ..., "content": ...}`; the content is a text, or a list of
            `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. OpenAI's
            `{"type": "image_url", "image_url": {"url": ...}}` is read too. The last message is the user's.
        images: Pictures for the parts that name none, in order. Without such parts they stand before the user's first
            words.
        open_source: Opens the picture that a part names.

    Raises:
        InputError: If a message cannot be read, or there are more or fewer pictures than places for them.

    Example:
        >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]).question
        'Hello'
    """
    pictures: list[Any] = list(images)
    if isinstance(messages, str):
        return Sample(pictures, messages)
    turns, named = read_turns(messages, "messages", plain_text)
    if named and pictures:
        raise InputError("Pictures are named in the messages and beside them.", "Name them in one place.")
    pictures = pictures or [open_source(source) for source in named]
    place_pictures(turns, len(pictures), "image part")
    if turns[-1][0] != "user":
        raise InputError(f"The last message is of the {turns[-1][0]}.", "End with a message of the user.")
    _, question, marks = turns.pop()
    return Sample(pictures, question, earlier=tuple(Turn(*turn) for turn in turns), marks=marks)


def place_pictures(turns: list[Spoken], count: int, what: str) -> None:
    """Put pictures that no turn has a place for before the user's first words.

    Args:
        turns: The conversation; changed.
        count: Number of pictures.
        what: Name of a place in messages.

    Raises:
        InputError: If there are more or fewer places than pictures, or no user.

    Example:
        >>> turns = [("system", "Be brief.", ()), ("user", "What differs?", ())]
        >>> place_pictures(turns, count=2, what="image part")
        >>> turns[1]
        ('user', 'What differs?', (0, 0))
    """
    marks = sum(len(turn[2]) for turn in turns)
    if not marks and count:
        first = next((index for index, turn in enumerate(turns) if turn[0] == "user"), None)
        if first is None:
            raise InputError("A conversation with pictures has no message of the user.", "Show them in one.")
        turns[first] = ("user", turns[first][1], (0,) * count)
    elif marks != count:
        raise InputError(
            f"It has {marks} {what}s and {count} pictures.", f"Write one {what} for each picture, and no other."
        )


def read_turns(value: Any, key: str, read_text: ReadText) -> tuple[list[Spoken], list[Any]]:  # noqa: ANN401
    """The turns of a conversation, and the pictures that it names itself.

    Args:
        value: A list of turns.
        key: "conversations", whose turns have `from` and `value`, or "messages", with `role` and `content`.
        read_text: Finds the places of pictures in a turn that is one text.

    Raises:
        InputError: If it is anything else.

    Example:
        >>> parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
        >>> read_turns([{"role": "user", "content": parts}], "messages", plain_text)
        ([('user', 'What is it?', (0,))], ['a.png'])
    """
    speaker, words = ("from", "value") if key == "conversations" else ("role", "content")
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_TURNS:
        raise InputError(f"'{key}' is no list of turns.", f'Write [{{"{speaker}": ..., "{words}": ...}}, ...].')
    turns: list[Spoken] = []
    pictures: list[Any] = []
    for turn in value:
        if not isinstance(turn, dict) or set(turn) != {speaker, words}:
            raise InputError(f"A turn of '{key}' has not just '{speaker}' and '{words}'.", "Write these two keys.")
        role = turn[speaker]
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"There is no speaker '{shortened(str(role))}'.", f"Known: {', '.join(ROLES)}.")
        if isinstance(turn[words], list | tuple):
            text, marks, named = _parts(turn[words], key)
            pictures += named
        else:
            text, marks = read_text(as_text(turn[words], words))
        turns.append((ROLES[role], text, marks))
    if any(marks for role, _, marks in turns if role != "user"):
        raise InputError("A picture stands in a turn that is not the user's.", "Show pictures in the user's turns.")
    return turns, pictures


def _parts(parts: Sequence[Any], key: str) -> tuple[str, Marks, list[Any]]:
    """A turn as a list of texts and pictures: its text, the places of its pictures, and what they name."""
    text, marks, pictures = "", [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        rest = {name: value for name, value in part.items() if name != "type"} if kind else {}
        if kind == "text" and set(rest) == {"text"}:
            text += as_text(rest["text"], "text")
            continue
        source = next(iter(rest.values()), None)
        if isinstance(source, dict) and "url" in source and set(source) <= {"url", "detail"}:
            source = source["url"]  # OpenAI's detail has no counterpart: a model has one way to read a picture
        if kind not in ("image", "image_url") or len(rest) > 1 or not set(rest) <= set(SOURCES):
            raise InputError(
                f"A part of '{key}' is neither text nor a picture.",
                'Write {"type": "text", "text": ...} or {"type": "image", "image": ...}.',
            )
        marks.append(len(text))
        pictures += [] if source is None else [source]
    return text, tuple(marks), pictures


def as_text(value: Any, key: str) -> str:  # noqa: ANN401 - any value
    """Return a value if it is a text.

    Raises:
        InputError: If it is anything else.

    Example:
        >>> as_text("yes", "answer")
        'yes'
        >>> as_text(7, "answer")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: 'answer' is a number, not a text. Write it as a text in quotes.
    """
    if not isinstance(value, str):
        raise InputError(f"'{key}' is {named(value)}, not a text.", "Write it as a text in quotes.")
    return value


def named(value: object) -> str:
    """Return JSON's name for the kind of a value.

    Example:
        >>> named(True), named(1.5), named(None), named({})
        ('true or false', 'a number', 'null', 'a table')
    """
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
