"""Text of an answer while it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qe_edge.models.texts import check_text
from qe_edge.system.errors import InputError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes of a character that has not come whole
MAX_STOPS = 16
MAX_STOP = 1024  # characters


class Detokenizer:
    """Turns tokens into text one by one. The pieces together are the tokenizer's text of all tokens at once.

    Only the tokens of the last two pieces are decoded, so the work for a token does not grow with the answer. Where a
    tokenizer has tokens for single bytes, and they become no character, the pieces may keep more of the others.

    Args:
        tokenizer: A tokenizer of transformers.

    Example:
        `text += detokenizer.add(token)` for every token, and `text += detokenizer.finish()` after the last.
    """

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - tokenizers share no typed base
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last piece, and of what came after it
        self._given = 0  # how many of them are the last piece's
        # such a tokenizer changes spaces that it wrote before
        self._keeps_all = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def add(self, token: int) -> str:
        """The text that a token adds; empty while bytes of its last character are to come."""
        self._ids.append(int(token))
        return self._new(final=False)

    def finish(self) -> str:
        """The rest of the text: bytes that became no character."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        earlier, text = self._decode(self._ids[: self._given]), self._decode(self._ids)
        if len(text) <= len(earlier) or (text.endswith(UNFINISHED) and not final):
            return ""
        # the last piece is decoded again with the next one: a decoder may strip the first space of what it gets
        if not self._keeps_all:
            del self._ids[: self._given]
        self._given = len(self._ids)
        return text[len(earlier) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class StopStrings:
    """Ends a text where one of several strings begins, and holds back what may become one.

    Args:
        stops: The strings.

    Raises:
        InputError: If one is empty or no text, or there are too many or too long ones.

    Example:
        >>> stops = StopStrings(["END"])
        >>> stops.add("The E"), stops.add("ast. EN"), stops.add("D of it"), stops.found
        ('The ', 'East. ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        for stop in stops:
            check_text(stop, "A stop string")
            if not 0 < len(stop) <= MAX_STOP:
                raise InputError(f"A stop string has {len(stop)} characters.", f"Give 1 to {MAX_STOP} characters.")
        if len(stops) > MAX_STOPS:
            raise InputError(f"There are {len(stops)} stop strings.", f"Give at most {MAX_STOPS}.")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, piece: str) -> str:
        """The part of the text that is certain now; empty after a stop string was found."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """The text that was held back and became no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text begin a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
