"""Texts of users, before they are used: what no tokenizer and no file can hold is refused."""

from __future__ import annotations

from qe_edge.system.errors import InputError, shown

SHOWN = 200  # characters of a user's text in a message


def check_text(text: object, what: str) -> None:
    """Refuse anything but a text that can be written as UTF-8.

    Args:
        text: What the user gave.
        what: What a message calls it.

    Raises:
        InputError: If it is no text, holds half of a surrogate pair, or a NUL character.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {shown(text)}, not a text.", "Give a str.")
    if not is_unicode(text):
        raise InputError(f"{what} is not valid Unicode.", "Write it as UTF-8; half a surrogate pair is no character.")
    if "\0" in text:
        raise InputError(f"{what} holds a NUL character.", "Remove it.")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8, as a text with lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(text: str) -> str:
    """A text for a message, cut where it is long."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
