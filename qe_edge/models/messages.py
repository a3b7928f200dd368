"""Chat messages as transformers and OpenAI write them, read into a `Sample`: every part is understood or refused."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qe_edge.models.images import Picture
from qe_edge.models.samples import Role, Sample, Shown, Turn
from qe_edge.models.texts import shortened
from qe_edge.models.videos import Video
from qe_edge.system.errors import InputError

ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
PICTURE, VIDEO = "image", "video"
SOURCES = {  # keys that name the picture or the video of a part, by the part's type
    "image": ("image", "path", "url", "image_url"),
    "image_url": ("image", "path", "url", "image_url"),
    "video": ("video", "path", "url", "video_url"),
    "video_url": ("video", "path", "url", "video_url"),
}
ADDRESS = re.compile(r"^(\w[\w+.-]+):", re.ASCII)  # of a URL; one letter is a drive of Windows
MAX_TURNS = 10_000

Marks = tuple[int, ...]  # where pictures and videos stand in a text
Spoken = tuple[Role, str, Marks]  # a turn
OpenSource = Callable[[Any], Picture]


@dataclass(frozen=True)
class Place:
    """A place of a picture or a video in messages.

    Attributes:
        kind: "image" or "video".
        source: What the place names itself; None for the next one that is given beside the messages.
        fps: Frames per second of a video, if the place says so.
    """

    kind: str
    source: Any = None
    fps: float | None = None


ReadText = Callable[[str], tuple[str, Marks, list[Place]]]


def plain_text(text: str) -> tuple[str, Marks, list[Place]]:
    """Return a text and no places: no word in it stands for a picture.

    Example:
        >>> plain_text("is it red?")
        ('is it red?', (), [])
    """
    return text, (), []


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
    videos: Sequence[Video] = (),
    *,
    open_source: OpenSource = local_picture,
) -> Sample:
    """Read a prompt or chat messages as one sample.

    Args:
        messages: A prompt, or a list of `{"role": ..., "content": ...}`; the content is a text, or a list of
            `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and `{"type": "video", "video": ...}`,
            which may say its frames per second under `fps`. OpenAI's `{"type": "image_url", "image_url": {"url": ...}}`
            is read too, and `video_url` likewise. The last message is the user's.
        images: Pictures for the parts that name none, in order. Without such parts they stand before the user's first
            words.
        videos: The same for videos; they stand behind the pictures.
        open_source: Opens the picture, or each frame of the video, that a part names.

    Raises:
        InputError: If a message cannot be read, or there are more or fewer pictures or videos than places for them.

    Example:
        >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]).question
        'Hello'
    """
    if isinstance(messages, str):
        return Sample([*images, *videos], messages)
    turns, places = read_turns(messages, "messages", plain_text)
    if any(place.source is not None for place in places):
        if images or videos:
            raise InputError("Pictures are named in the messages and beside them.", "Name them in one place.")
        unnamed = sum(place.source is None for place in places)
        if unnamed:
            raise InputError(
                f"It has {len(places)} image parts and {len(places) - unnamed} pictures.",
                "Write one image part for each picture, and no other.",
            )
        media = [_open(place, open_source) for place in places]
    else:
        media = filled(turns, places, images, videos, "{} part")
    if turns[-1][0] != "user":
        raise InputError(f"The last message is of the {turns[-1][0]}.", "End with a message of the user.")
    _, question, marks = turns.pop()
    return Sample(media, question, earlier=tuple(Turn(*turn) for turn in turns), marks=marks)


def read_beside(messages: Any, media: Any) -> Sample:  # noqa: ANN401 - from a user
    """As `read_messages`, with pictures and videos in one list.

    Args:
        messages: A prompt or chat messages.
        media: A picture, a `Video`, a list of both, or None. Beside a prompt they keep their order.

    Raises:
        InputError: As `read_messages`.

    Example:
        >>> read_beside("What is this?", ["a.png", Video(["1.png", "2.png"], fps=2)]).videos[0].fps
        2.0
    """
    given = [] if media is None else list(media) if isinstance(media, list | tuple) else [media]
    opened = [shown if isinstance(shown, Video) else local_picture(shown) for shown in given]
    if isinstance(messages, str):
        return Sample(opened, messages)
    images = [shown for shown in opened if not isinstance(shown, Video)]
    return read_messages(messages, images, [shown for shown in opened if isinstance(shown, Video)])


def filled(
    turns: list[Spoken], places: Sequence[Place], images: Sequence[Any], videos: Sequence[Any], what: str
) -> list[Any]:
    """Bring pictures and videos into the order of their places; without places they stand before the user's words.

    Args:
        turns: The conversation; changed where there are no places.
        places: Of all turns, in order.
        images: The pictures, in order.
        videos: The videos, in order.
        what: Name of a place in messages, with {} for "image" or "video".

    Raises:
        InputError: If there are more or fewer places than pictures or videos, or no user.

    Example:
        >>> turns = [("system", "Be brief.", ()), ("user", "What differs?", ())]
        >>> filled(turns, [], ["a.png"], ["b.gif"], what="{} part")
        ['a.png', 'b.gif']
        >>> turns[1]
        ('user', 'What differs?', (0, 0))
    """
    if not places:
        place_pictures(turns, len(images) + len(videos), what.format(PICTURE))
        return [*images, *videos]
    given = {PICTURE: list(images), VIDEO: list(videos)}
    for kind, shown in given.items():
        count = sum(place.kind == kind for place in places)
        if count != len(shown):
            noun = "picture" if kind == PICTURE else "video"
            raise InputError(
                f"It has {count} {what.format(kind)}s and {len(shown)} {noun}s.",
                f"Write one {what.format(kind)} for each {noun}, and no other.",
            )
    waiting = {kind: iter(shown) for kind, shown in given.items()}
    return [next(waiting[place.kind]) for place in places]


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


def read_turns(value: Any, key: str, read_text: ReadText) -> tuple[list[Spoken], list[Place]]:  # noqa: ANN401
    """The turns of a conversation, and its places of pictures and videos.

    Args:
        value: A list of turns.
        key: "conversations", whose turns have `from` and `value`, or "messages", with `role` and `content`.
        read_text: Finds the places of pictures in a turn that is one text.

    Raises:
        InputError: If it is anything else.

    Example:
        >>> parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
        >>> read_turns([{"role": "user", "content": parts}], "messages", plain_text)
        ([('user', 'What is it?', (0,))], [Place(kind='image', source='a.png', fps=None)])
    """
    speaker, words = ("from", "value") if key == "conversations" else ("role", "content")
    if not isinstance(value, list | tuple) or not 0 < len(value) <= MAX_TURNS:
        raise InputError(f"'{key}' is no list of turns.", f'Write [{{"{speaker}": ..., "{words}": ...}}, ...].')
    turns: list[Spoken] = []
    places: list[Place] = []
    for turn in value:
        if not isinstance(turn, dict) or set(turn) != {speaker, words}:
            raise InputError(f"A turn of '{key}' has not just '{speaker}' and '{words}'.", "Write these two keys.")
        role = turn[speaker]
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"There is no speaker '{shortened(str(role))}'.", f"Known: {', '.join(ROLES)}.")
        if isinstance(turn[words], list | tuple):
            text, marks, named = _parts(turn[words], key)
        else:
            text, marks, named = read_text(as_text(turn[words], words))
        places += named
        turns.append((ROLES[role], text, marks))
    if any(marks for role, _, marks in turns if role != "user"):
        raise InputError("A picture stands in a turn that is not the user's.", "Show pictures in the user's turns.")
    return turns, places


def _parts(parts: Sequence[Any], key: str) -> tuple[str, Marks, list[Place]]:
    """A turn as a list of texts, pictures and videos: its text, and their places."""
    text, marks, places = "", [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        rest = {name: value for name, value in part.items() if name != "type"} if kind else {}
        if kind == "text" and set(rest) == {"text"}:
            text += as_text(rest["text"], "text")
            continue
        film = isinstance(kind, str) and kind.startswith(VIDEO)
        fps = rest.pop("fps", None) if film else None
        source = next(iter(rest.values()), None)
        if isinstance(source, dict) and "url" in source and set(source) <= {"url", "detail"}:
            source = source["url"]  # OpenAI's detail has no counterpart: a model has one way to read a picture
        if not isinstance(kind, str) or kind not in SOURCES or len(rest) > 1 or not set(rest) <= set(SOURCES[kind]):
            raise InputError(
                f"A part of '{key}' is neither text nor a picture nor a video.",
                'Write {"type": "text", "text": ...}, {"type": "image", "image": ...} or {"type": "video", ...}.',
            )
        marks.append(len(text))
        places.append(Place(VIDEO if film else PICTURE, source, fps))
    return text, tuple(marks), places


def _open(place: Place, open_source: OpenSource) -> Shown:
    if place.kind == PICTURE:
        return open_source(place.source)
    if isinstance(place.source, Video):
        return place.source
    return as_video(place.source, place.fps, open_source)


def as_video(source: Any, fps: float | None, open_source: OpenSource = local_picture) -> Video:  # noqa: ANN401
    """The video that a user names: one path, frames in a list or an array, or the bytes of an animated picture.

    Raises:
        InputError: If it is none of these.

    Example:
        >>> as_video(["0001.png", "0002.png"], fps=2).fps
        2.0
    """
    if isinstance(source, list | tuple):
        return Video([open_source(frame) for frame in source], fps)
    opened: Any = open_source(source)  # a video checks its type
    return Video(opened, fps)


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
