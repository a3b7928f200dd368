r"""Reads one line of a JSONL file. Every key and every value is understood or refused.

Three forms, whose pictures are `image` or `images`, one path or a list of paths, and whose videos are `video`, or
`videos` in a list; a video is the path of a folder or file, a list of paths of frames, or either under `frames` in a
table beside `fps`:

- `{"image": ..., "question": ..., "answer": ...}`, of which `answer` and one of the others may be missing;
- `{"image": ..., "conversations": [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", ...}]}`, as
  LLaVA writes it, or `messages` with `role` and `content`, as chat models read it;
- `{"text": ...}` alone: running text for a language model.

For a model that acts, `question` is the task. Beside it stand the robot's `state`, a list of numbers, and perhaps the
`actions` that followed, a list of such lists.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qe_edge.calibration.captions import CAPTION_PROMPT, IMAGE_MARK
from qe_edge.models.images import is_file
from qe_edge.models.messages import ADDRESS, Marks, Place, Spoken, as_text, filled, named, read_turns
from qe_edge.models.samples import TEXT, Sample, Shown, Turn
from qe_edge.models.texts import shortened
from qe_edge.models.videos import Video
from qe_edge.system.errors import CalibrationError, InputError
from qe_edge.system.json_files import parse_json

ROBOT_KEYS = ("state", "actions")
PICTURE_KEYS = ("image", "images")
VIDEO_KEYS = ("video", "videos")
VIDEO_MARK = "<video>"
IMAGE_MARKS = re.compile(re.escape(IMAGE_MARK))
ALL_MARKS = re.compile(f"{re.escape(IMAGE_MARK)}|{VIDEO_MARK}")
MARK = "<{}> mark"
CONVERSATION_KEYS = ("conversations", "messages")
LABELS = ("kind", "topic")
KEYS = (*PICTURE_KEYS, *VIDEO_KEYS, "question", "answer", "answers", *CONVERSATION_KEYS, "text", *LABELS, *ROBOT_KEYS)
IGNORED = ("id", "question_id", "image_id", "dataset", "source", "split", "metadata")  # they say nothing to a model
FILM = 'Name a folder, a file or a list of frames, or write {"frames": ..., "fps": 2}.'
FORM = 'Each line is JSON: {"image": ..., "question": ..., "answer": ...}, or {"text": ...} alone.'


def read_line(line: str, path: Path, number: int) -> Sample:
    """The sample that a line describes.

    Args:
        line: The line.
        path: Its file; picture paths start in the file's folder and must not leave it.
        number: Which line of the file it is, from 1.

    Raises:
        CalibrationError: Naming file and line, and what is wrong with it.

    Example:
        >>> sample = read_line('{"text": "A line of running text."}', Path("data.jsonl"), number=1)
        >>> sample.question, sample.kind
        ('A line of running text.', 'text')
        >>> read_line('{"image": "cat.png", "quesion": "What is it?"}', Path("data.jsonl"), number=2)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.CalibrationError: Line 2 of 'data.jsonl' has the unknown key 'quesion'. Did you mean
        'question'? Known: image, images, video, videos, question, answer, answers, conversations, messages, text,
        kind, topic, state, actions; ignored: id, question_id, image_id, dataset, source, split, metadata.
    """
    where = f"Line {number} of '{path}'"
    entry = parse_json(line, f"Line {number} of {path}", CalibrationError, FORM, strict=True)
    if not isinstance(entry, dict):
        raise CalibrationError(f"{where} is not a sample.", FORM)
    _check_keys(entry, where)
    try:
        return _sample(entry, path.parent.resolve(), where)
    except InputError as error:
        raise CalibrationError(f"{where}: {error.problem}", error.remedy) from error


def _check_keys(entry: dict[str, Any], where: str) -> None:
    for key in entry:
        if key not in KEYS and key not in IGNORED:
            close = difflib.get_close_matches(key.lower(), KEYS, n=1, cutoff=0.5)
            hint = f"Did you mean '{close[0]}'? " if close else ""
            raise CalibrationError(
                f"{where} has the unknown key '{shortened(key)}'.",
                f"{hint}Known: {', '.join(KEYS)}; ignored: {', '.join(IGNORED)}.",
            )
    used = {key for key in KEYS if entry.get(key) is not None}
    for one, other in (PICTURE_KEYS, VIDEO_KEYS, CONVERSATION_KEYS, *((key, "question") for key in CONVERSATION_KEYS)):
        if {one, other} <= used:
            raise CalibrationError(f"{where} has both '{one}' and '{other}'.", "Keep one of them.")
    beside = sorted(used - {"text", *LABELS})
    if "text" in used and beside:
        raise CalibrationError(f"{where} has 'text' beside '{beside[0]}'.", "Running text stands alone in its line.")


def _sample(entry: dict[str, Any], folder: Path, where: str) -> Sample:
    labels = {key: _label(entry.get(key), key) for key in LABELS}
    if entry.get("text") is not None:
        text = as_text(entry["text"], "text")
        if not text.strip():
            raise InputError("Its text is empty.", "Leave empty texts out.")
        return Sample(None, text, kind=TEXT, topic=labels["topic"], origin=where)
    pictures: list[Any] = []
    for key in PICTURE_KEYS:
        value = entry.get(key)
        pictures += value if isinstance(value, list) else [] if value is None else [value]
    films = [] if entry.get("video") is None else [entry["video"]]
    if entry.get("videos") is not None:
        if not isinstance(entry["videos"], list):
            raise InputError("'videos' is no list.", "Write one video as 'video'.")
        films = entry["videos"]
    answers = _answers(entry)
    form = next((key for key in CONVERSATION_KEYS if entry.get(key) is not None), None)
    read_text = _marked_with_videos if films else _marked
    if form is None:
        question = entry.get("question", CAPTION_PROMPT if pictures or films else None)
        if question is None:
            raise InputError("It asks nothing.", FORM)
        text, marks, places = read_text(as_text(question, "question"))
        turns: list[Spoken] = [("user", text, marks)]
    else:
        turns, places = read_turns(entry[form], form, read_text)
    media = _placed(turns, places, pictures, films, form, folder)
    if form is not None and turns[-1][0] == "assistant":
        _, reply, _ = turns.pop()
        if answers:
            raise InputError(f"'{form}' ends with an answer, and there is another beside it.", "Keep one of them.")
        answers = [reply]
    found = _assembled(turns, media, answers, labels, where)
    return replace(found, state=entry.get("state"), actions=entry.get("actions"))


def _placed(
    turns: list[Spoken],
    places: list[Place],
    pictures: list[Any],
    films: list[Any],
    form: str | None,
    folder: Path,
) -> list[Shown]:
    """The pictures and videos of a line in the order of their places."""
    if any(place.source is not None for place in places):
        if pictures or films:
            raise InputError(f"Pictures are named in '{form}' and beside it.", "Name them in one place.")
        if any(place.source is None for place in places):
            raise InputError("A part names no picture.", "Name one in each part, or all beside the conversation.")
        sources = [(place.kind, place.source, place.fps) for place in places]
    else:
        still, moving = (
            [(kind, one, None) for one in given] for kind, given in (("image", pictures), ("video", films))
        )
        sources = filled(turns, places, still, moving, MARK)
    return [_picture(one, folder) if kind == "image" else _film(one, fps, folder) for kind, one, fps in sources]


def _assembled(
    turns: list[Spoken],
    media: list[Shown],
    answers: list[str],
    labels: dict[str, Any],
    where: str,
) -> Sample:
    """The sample of a conversation that ends with the question."""
    if not turns or turns[-1][0] != "user":
        raise InputError("The conversation has no question of the user before its end.", "End it with one.")
    _, question, places = turns.pop()
    return Sample(
        media,
        question,
        answers=tuple(answers),
        earlier=tuple(Turn(*turn) for turn in turns),
        marks=places,
        origin=where,
        **labels,
    )


def _marked(text: str, marks: re.Pattern[str] = IMAGE_MARKS) -> tuple[str, Marks, list[Place]]:
    """A text without the marks of its pictures, and where they stood; space around marks at its ends goes too."""
    pieces = marks.split(text)
    if len(pieces) == 1:
        return text, (), []
    first = next((index for index, piece in enumerate(pieces) if piece.strip()), 0)
    last = next((index for index in reversed(range(len(pieces))) if pieces[index].strip()), 0)
    for index, piece in enumerate(pieces):
        if not piece.strip() and not first < index < last:
            pieces[index] = ""
    if first:
        pieces[first] = pieces[first].lstrip()
    if last < len(pieces) - 1:
        pieces[last] = pieces[last].rstrip()
    ends = [sum(map(len, pieces[: count + 1])) for count in range(len(pieces) - 1)]
    places = [Place("video" if found == VIDEO_MARK else "image") for found in marks.findall(text)]
    return "".join(pieces), tuple(ends), places


def _marked_with_videos(text: str) -> tuple[str, Marks, list[Place]]:
    """As `_marked`, in a line that names videos."""
    return _marked(text, ALL_MARKS)


def _answers(entry: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for key in ("answer", "answers"):
        value = entry.get(key)
        if value is None:
            continue
        if isinstance(value, list) and not value:
            raise InputError(f"'{key}' is an empty list.", "Give at least one answer, or leave the key out.")
        found += [_answer(one) for one in (value if isinstance(value, list) else [value])]
    return found


def _answer(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, bool):
        raise InputError(f"An answer is {str(value).lower()}, not a text.", 'Write "yes" or "no" in quotes.')
    if isinstance(value, int | float):
        return str(value)
    return as_text(value, "answer")


def _label(value: Any, key: str) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return "" if value is None else as_text(value, key)


def _film(value: Any, fps: Any, folder: Path) -> Video:  # noqa: ANN401 - any JSON value
    """The video that a line names: a path, a list of paths, or either with its rate in a table."""
    every_frame = False
    if isinstance(value, dict):
        if not set(value) <= {"frames", "fps", "every_frame"} or "frames" not in value:
            raise InputError("A video is a table of other keys than 'frames', 'fps' and 'every_frame'.", FILM)
        value, fps, every_frame = value["frames"], value.get("fps", fps), value.get("every_frame", False)
        if not isinstance(every_frame, bool):
            raise InputError("'every_frame' of a video is neither true nor false.", "Write true or false.")
    if isinstance(value, list):
        return Video([_picture(frame, folder) for frame in value], fps, every_frame)
    if not isinstance(value, str):
        raise InputError(f"A video is {named(value)}.", FILM)
    return Video(_inside(value, folder, "video", is_there), fps, every_frame)


def is_there(path: Path) -> bool:
    """Whether a path is a file or a folder.

    Example:
        >>> is_there(Path(".")), is_there(Path("missing.gif"))
        (True, False)
    """
    return is_file(path) or path.is_dir()


def _picture(value: Any, folder: Path) -> Path:  # noqa: ANN401 - any JSON value
    """The file that a line names, inside `folder`."""
    if not isinstance(value, str):
        raise InputError(f"A picture is {named(value)}, not a path.", "Name the picture's file.")
    return _inside(value, folder, "picture", is_file)


def _inside(value: str, folder: Path, what: str, exists: Callable[[Path], bool]) -> Path:
    shown = shortened(value)
    address = ADDRESS.match(value)
    if address:
        remedies = {"data": f"Save the {what} as a file", "file": "Write the path without 'file:'"}
        raise InputError(
            f"Its {what} '{shown}' is an address, not a file.",
            f"{remedies.get(address.group(1).lower(), f'Download the {what}')}, and name the file.",
        )
    try:
        target = (folder / value).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, too long, a circle of links
        raise InputError(f"Its {what} '{shown}' is no path of a file.", f"Name the {what}'s file.") from error
    if not target.is_relative_to(folder):
        raise InputError(f"Its {what} '{shown}' lies outside its folder.", f"Put the {what}s beside the JSONL file.")
    if not exists(target):
        raise InputError(f"It names the missing {what} '{shown}'.", "Add the file or remove the line.")
    return target
