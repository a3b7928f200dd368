"""Check texts of users before they are used: text that no tokenizer or no file can hold is refused."""

from __future__ import annotations

from qe_edge.system.errors import InputError, shown

SHOWN = 200  # characters of a user's text in a message


def check_text(text: object, what: str) -> None:
    """Refuse anything but a text that can be written as UTF-8.

    Args:
        text: The user's value.
        what: Its name in messages.

    Raises:
        InputError: If it is no text, holds half of a surrogate pair, or a NUL character.

    Example:
        >>> check_text("a question", "A question")  # fine
        >>> check_text(7, "A question")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: A question is 7, not a text. Give a str.
    """
    if not isinstance(text, str):
        raise InputError(f"{what} is {shown(text)}, not a text.", "Give a str.")
    if not is_unicode(text):
        raise InputError(f"{what} is not valid Unicode.", "Write it as UTF-8; half a surrogate pair is no character.")
    if "\0" in text:
        raise InputError(f"{what} holds a NUL character.", "Remove it.")


def is_unicode(text: str) -> bool:
    r"""Whether a text can be written as UTF-8, as a text with lone surrogates cannot.

    Example:
        >>> is_unicode("red"), is_unicode("red" + chr(0xD83D))  # the second ends in half a surrogate pair
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shortened(text: str) -> str:
    """Return a text for a message, cut if it is long.

    Example:
        >>> shortened("short"), len(shortened("x" * 1000))
        ('short', 200)
    """
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
