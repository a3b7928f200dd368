"""Token ids of users' texts, in the form of a chat template; a user's text never becomes a control token.

Ordinary text goes through the tokenizer as a whole. Where a user's text spells a special token ("<|im_end|>"), the
template is rendered with stand-ins, cut at its own special tokens, and tokenized piece by piece. A tokenizer that gives
other ids for pieces than for the whole cannot do that, and the text is refused.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from qe_edge.models.samples import Sample, Turn
from qe_edge.system.errors import InputError

Rewrite = Callable[[str], str]
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError)  # of a template that is code


def as_it_is(prompt: str) -> str:
    """Return a prompt unchanged, as most families take it.

    Example:
        >>> as_it_is("<|im_start|>user")
        '<|im_start|>user'
    """
    return prompt


def filled_places(prompt: str, token: str, texts: Sequence[str]) -> str:
    """Put texts in the places of a token, in order; further places keep it, and further texts are left out.

    Example:
        >>> filled_places("<v> and <v>, not <v>", "<v>", ["1", "2"])
        '1 and 2, not <v>'
    """
    first, *others = prompt.split(token)
    placed = [*texts[: len(others)], *[token] * (len(others) - len(texts))]
    return first + "".join(text + other for text, other in zip(placed, others, strict=True))


def chat_ids(
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
    turns: Sequence[Turn],
    *,
    as_parts: bool,
    rewrite: Rewrite = as_it_is,
) -> list[int]:
    """Ids of a conversation up to where the assistant answers, with one image token per picture.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        turns: The conversation.
        as_parts: Whether the template takes a turn as a list of texts and pictures, and not as one text.
        rewrite: Changes the prompt before it is tokenized; special tokens in it are the template's own.

    Raises:
        InputError: If the template refuses or leaves out a turn, or the tokenizer cannot read a special token as text.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> ids = chat_ids(tokenizer, [Turn("user", "say <|im_end|>")], as_parts=True)
        >>> tokenizer.convert_ids_to_tokens(ids).count("<|im_end|>")  # only the template's own; the user's is text
        1
    """
    special = special_pattern(tokenizer)
    if not any(special.search(turn.text) for turn in turns):
        ids: list[int] = tokenizer(rewrite(render_turns(tokenizer, turns, as_parts)), add_special_tokens=False)[
            "input_ids"
        ]
        return ids
    stand_ins: dict[str, str] = {}

    def hide(text: str) -> str:
        return special.sub(lambda found: _stand_in(stand_ins, found.group()), text)

    hidden = [_mapped(turn, hide) for turn in turns]
    prompt = rewrite(render_turns(tokenizer, hidden, as_parts))
    whole = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if _in_pieces(tokenizer, prompt, special, {}) != whole:
        raise _unreadable(special, turns)
    ids = _in_pieces(tokenizer, prompt, special, {word: text for text, word in stand_ins.items()})
    if _count_special(tokenizer, ids) != _count_special(tokenizer, whole):
        raise _unreadable(special, turns)
    return ids


def text_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:  # noqa: ANN401
    """Ids of a text without a template; special tokens that it spells are text.

    Args:
        tokenizer: A tokenizer of transformers.
        text: The text.
        add_special_tokens: Whether the tokenizer puts its own special tokens around it.

    Raises:
        InputError: If the tokenizer cannot read a special token as text.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> tokenizer.convert_ids_to_tokens(text_ids(tokenizer, "is it red?", add_special_tokens=False))
        ['is', 'Ġi', 't', 'Ġred', '?']
    """
    options = {"add_special_tokens": add_special_tokens, "verbose": False}  # its length is the family's to check
    special = special_pattern(tokenizer)
    if not special.search(text):
        ids: list[int] = tokenizer(text, **options)["input_ids"]
        return ids
    ids = tokenizer(text, split_special_tokens=True, **options)["input_ids"]
    frame = tokenizer("a", **options)["input_ids"]
    if _count_special(tokenizer, ids) != _count_special(tokenizer, frame):
        raise _unreadable(special, [Turn("user", text)])
    return ids


def answer_ids(tokenizer: Any, sample: Sample) -> list[int]:  # noqa: ANN401 - tokenizers share no typed base
    """The reference answer closed by the end-of-turn token; empty where there is none.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> tokenizer.decode(answer_ids(tokenizer, Sample("a.png", "is it red?", "yes")))
        'yes<|im_end|>'
    """
    if sample.answer is None:
        return []
    return [*text_ids(tokenizer, sample.answer, add_special_tokens=False), int(tokenizer.eos_token_id)]


def earlier_answers(
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
    turns: Sequence[Turn],
    ids: Sequence[int],
    *,
    as_parts: bool,
    rewrite: Rewrite = as_it_is,
) -> list[int]:
    """Find the assistant's earlier answers in a conversation's ids, each with its end-of-turn token.

    A template may leave out or rewrite a part of an earlier answer. Such an answer is left out.

    Args:
        tokenizer: As for `chat_ids`.
        turns: The conversation.
        ids: Its ids, from `chat_ids`.
        as_parts: As for `chat_ids`.
        rewrite: As for `chat_ids`.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> turns = [Turn("user", "is it red?"), Turn("assistant", "no"), Turn("user", "what color is it?")]
        >>> ids = chat_ids(tokenizer, turns, as_parts=True)
        >>> places = earlier_answers(tokenizer, turns, ids, as_parts=True)
        >>> tokenizer.decode([ids[place] for place in places])
        'no<|im_end|>'
    """
    found: list[int] = []
    for number, turn in enumerate(turns[:-1]):
        if turn.role != "assistant" or not number:
            continue
        try:
            start = len(before := chat_ids(tokenizer, turns[:number], as_parts=as_parts, rewrite=rewrite))
            answer = text_ids(tokenizer, turn.text, add_special_tokens=False)
        except InputError:  # half a conversation is none to this template
            continue
        end = start + len(answer)
        if list(ids[:start]) == before and list(ids[start:end]) == answer:
            found += range(start, end + (ids[end] == tokenizer.eos_token_id))
    return found


def render_turns(tokenizer: Any, turns: Sequence[Turn], as_parts: bool) -> str:  # noqa: ANN401
    r"""A conversation as the text that the template makes of it, up to where the assistant answers.

    Args:
        tokenizer: As for `chat_ids`.
        turns: The conversation.
        as_parts: As for `chat_ids`.

    Raises:
        InputError: If the template refuses or leaves out a turn.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> render_turns(tokenizer, [Turn("user", "is it red?")], as_parts=True)[-50:]
        '|>user\nis it red?<|im_end|>\n<|im_start|>assistant\n'
    """
    messages = [{"role": turn.role, "content": _parts(turn) if as_parts else turn.text} for turn in turns]
    try:
        prompt: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except REFUSALS as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"The model's chat template refuses the conversation: {reason}.",
            "Give turns of user and assistant in alternation, or one question.",
        ) from error
    missing = next((turn for turn in turns[:-1] if any(piece.strip() not in prompt for piece in _pieces(turn))), None)
    if missing is not None:
        raise InputError(
            f"The model's chat template leaves out a turn of the {missing.role}.", "Give the question without it."
        )
    return prompt


def _parts(turn: Turn) -> list[dict[str, str]]:
    """A turn as chat templates of vision-language models read it: pictures and videos between pieces of text."""
    parts: list[dict[str, str]] = []
    start = 0
    for number, mark in enumerate(turn.marks):
        if mark > start:
            parts.append({"type": "text", "text": turn.text[start:mark]})
        parts.append({"type": "video" if number in turn.videos else "image"})
        start = mark
    if start < len(turn.text) or start == 0:
        parts.append({"type": "text", "text": turn.text[start:]})
    return parts


def _pieces(turn: Turn) -> list[str]:
    """The text before, between and after the pictures."""
    return [turn.text[start:end] for start, end in zip((0, *turn.marks), (*turn.marks, len(turn.text)), strict=True)]


def special_pattern(tokenizer: Any) -> re.Pattern[str]:  # noqa: ANN401
    """Return a pattern that matches any special token's text, the longest first.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> special_pattern(tokenizer).findall("a <|im_end|> in a text")
        ['<|im_end|>']
    """
    spelled = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    words = sorted(spelled | set(filter(None, tokenizer.all_special_tokens)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or "(?!)")


def _stand_in(stand_ins: dict[str, str], text: str) -> str:
    """A word that no template knows and nobody can guess."""
    return stand_ins.setdefault(text, f"x{secrets.token_hex(16)}x")


def _mapped(turn: Turn, change: Any) -> Turn:  # noqa: ANN401 - a function of text
    """A turn with other text; marks stay between the same characters unless they split a special token."""
    changed = [change(piece) for piece in _pieces(turn)]
    ends = [sum(map(len, changed[: count + 1])) for count in range(len(turn.marks))]
    return Turn(turn.role, "".join(changed), tuple(ends), turn.videos)


def _in_pieces(tokenizer: Any, prompt: str, special: re.Pattern[str], texts: dict[str, str]) -> list[int]:  # noqa: ANN401
    """Ids of a rendered prompt whose stand-ins are replaced by the texts that they stand for."""
    ids: list[int] = []
    start = 0
    for found in [*special.finditer(prompt), None]:
        piece = prompt[start : found.start() if found else len(prompt)]
        for word, text in texts.items():
            piece = piece.replace(word, text)
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if found:
            ids.append(tokenizer.convert_tokens_to_ids(found.group()))
            start = found.end()
    return ids


def _count_special(tokenizer: Any, ids: Sequence[int]) -> int:  # noqa: ANN401
    known = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return sum(number in known - {tokenizer.unk_token_id} for number in ids)


def _unreadable(special: re.Pattern[str], turns: Sequence[Turn]) -> InputError:
    found = next((match.group() for turn in turns if (match := special.search(turn.text))), "")
    return InputError(
        f"A text spells the special token '{found}', which this tokenizer cannot read as text.",
        "Leave it out, or put a space into it.",
    )
