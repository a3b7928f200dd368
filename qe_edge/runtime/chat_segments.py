"""`chat.json`: the chat template as texts to put between turns, for programs that run no templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qe_edge.models.samples import Turn
from qe_edge.models.texts import shortened
from qe_edge.system.errors import ArtifactError, InputError
from qe_edge.system.json_files import read_json_table

CHAT = "chat.json"
FORMAT_VERSION = 1
REMEDY = "Export or build the model again."
START, ANSWER = "start", "answer"  # places before the first turn and after the last
WITH_PICTURE = "+picture"  # after a role: the turn begins with a picture
WHITESPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace())  # what str.strip() takes away


@dataclass(frozen=True)
class Piece:
    """A part of a prompt.

    Attributes:
        text: Its text.
        trusted: Whether it belongs to the template, where special tokens count; in a user's text they are text.
    """

    text: str
    trusted: bool


class ChatSegments(BaseModel):
    """A chat template in parts.

    Attributes:
        format_version: Of the file.
        problem: Why conversations cannot be written from these parts, one sentence; None if they can.
        joints: The text between two turns, by the first and the second. The first is "start" or a role. The second is a
            role, a role with "+picture" for a turn that begins with a picture, or "answer".
        picture: The text of a picture; it holds the placeholder token once. Empty without pictures.
        pictures_first: Whether the pictures of a turn stand before all its text, wherever the user put them.
        last: The text before what a turn says after its last picture; before all of it, where there are no pictures.
        strip: By role, the characters that are taken from both ends of each text, before and after pictures too.
        refused: Texts that the template treats in a way of its own; no turn may hold one.

    Example:
        >>> chat = ChatSegments(joints={"start": {"user": "<u>"}, "user": {"answer": "</u><a>"}})
        >>> chat.text([Turn("user", "What is this?")])
        '<u>What is this?</u><a>'
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int = FORMAT_VERSION
    problem: str | None = Field(None, max_length=1000)
    joints: Mapping[str, Mapping[str, str]] = Field(default_factory=dict)
    picture: str = ""
    pictures_first: bool = False
    last: str = ""
    strip: Mapping[str, str] = Field(default_factory=dict)
    refused: tuple[str, ...] = ()

    def pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        """A conversation up to where the assistant answers; neighbours are never both trusted.

        Raises:
            InputError: If the template has no place for a turn.
        """
        if self.problem is not None:
            raise InputError(self.problem, "Give running text, or use Python, which runs the template itself.")
        parts: list[Piece] = []
        before = START
        for turn in turns:
            word = next((word for word in self.refused if word in turn.text), None)
            if word is not None:
                raise InputError(
                    f"The chat template treats '{shortened(word)}' in a turn in a way of its own.", "Leave it out."
                )
            begins = turn.marks and (self.pictures_first or turn.marks[0] == 0)
            role = turn.role + (WITH_PICTURE if begins else "")
            parts.append(Piece(self._joint(before, role), trusted=True))
            parts += self._content(turn)
            before = turn.role
        parts.append(Piece(self._joint(before, ANSWER), trusted=True))
        return _merged(parts)

    def text(self, turns: Sequence[Turn]) -> str:
        """The same as one text.

        Raises:
            InputError: As `pieces`.
        """
        return "".join(piece.text for piece in self.pieces(turns))

    def _content(self, turn: Turn) -> list[Piece]:
        """Texts and pictures of a turn in their order."""
        parts = [Piece(self.picture, trusted=True) for _ in turn.marks] if self.pictures_first else []
        ends = (*turn.marks, len(turn.text))
        for number, (start, end) in enumerate(zip((0, *turn.marks), ends, strict=True)):
            if number and not self.pictures_first:
                parts.append(Piece(self.picture, trusted=True))
            if number == len(turn.marks):
                parts.append(Piece(self.last, trusted=True))
            parts.append(Piece(turn.text[start:end].strip(self.strip.get(turn.role) or "\0"), trusted=False))
        return parts

    def _joint(self, before: str, after: str) -> str:
        found = self.joints.get(before, {}).get(after)
        if found is not None:
            return found
        where = "first" if before == START else f"after a turn of the {before}"
        what = "the answer" if after == ANSWER else f"a turn of the {after.removesuffix(WITH_PICTURE)}"
        picture = " that begins with a picture" if after.endswith(WITH_PICTURE) else ""
        raise InputError(
            f"The model's chat template has no place for {what}{picture} {where}.",
            "Give turns of user and assistant in alternation, or one question.",
        )


def read_chat(folder: Path) -> ChatSegments:
    """The parts of a folder's chat template.

    Raises:
        ArtifactError: If `chat.json` is missing, damaged or of another version.

    Example:
        >>> chat = ChatSegments(joints={"start": {"user": "<u>"}, "user": {"answer": "</u><a>"}})
        >>> _ = Path("chat.json").write_text(chat.model_dump_json())
        >>> read_chat(Path()).text([Turn("user", "What is this?")])
        '<u>What is this?</u><a>'
    """
    path = folder / CHAT
    if not path.is_file():
        raise ArtifactError(f"'{folder}' has no {CHAT}.", REMEDY)
    values = read_json_table(path, remedy=REMEDY)
    if values.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(f"'{path}' is of another version.", REMEDY)
    try:
        return ChatSegments.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"'{path}' is damaged: {where}: {first['msg'].lower()}.", REMEDY) from error


def _merged(parts: Sequence[Piece]) -> list[Piece]:
    """The same text with neighbours of one kind joined and without empty parts."""
    merged: list[Piece] = []
    for part in parts:
        if part.text and merged and merged[-1].trusted == part.trusted:
            merged[-1] = Piece(merged[-1].text + part.text, part.trusted)
        elif part.text:
            merged.append(part)
    return merged
