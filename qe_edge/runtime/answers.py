"""The types of answers, whole and piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]
"""The model or a stop string ended the answer; it has `max_new_tokens`, or the context is full; it was cancelled."""


@dataclass(frozen=True)
class Timings:
    """Times of the parts of an answer.

    Attributes:
        waited: Seconds until its turn came.
        preprocessing: Seconds in which pictures were opened and prepared, and the prompt tokenized.
        visual: Seconds in the visual encoder; 0 where every picture was known.
        merger: Seconds in the merger.
        prefill: Seconds in which the language model read the new part of the prompt.
        first_token: Seconds from the call to the first token; the sum of the above.
        decode: Seconds from the first token to the last.
        prompt_tokens: Tokens of the prompt, pictures included.
        reused_tokens: Tokens of the prompt that were in the cache already.
        answer_tokens: Tokens of the answer.
    """

    waited: float
    preprocessing: float
    visual: float
    merger: float
    prefill: float
    first_token: float
    decode: float
    prompt_tokens: int
    reused_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Piece:
    """A part of an answer.

    Attributes:
        text: Whole characters; the texts of all pieces together are the answer.
        token_ids: The tokens that were chosen since the piece before.
        finish_reason: Why the answer ended, in its last piece; None in the others.
        timings: Times of its parts, in its last piece; None in the others.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: The text, without special tokens and without the stop string that ended it.
        token_ids: Its tokens, without the one that ended it.
        finish_reason: Why it ended.
        timings: Times of its parts.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
