"""Takes a chat template apart into `chat.json`, and proves that the parts write the same text as the template.

The template is rendered for conversations of random words; the text between two words is a joint. Then the parts have
to give the template's text for a dozen other conversations, and for every word that the template itself spells, because
it may ask whether a turn holds that word.
"""

from __future__ import annotations

import ast
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from qe_edge.models.chat import special_pattern
from qe_edge.models.family import ModelFamily
from qe_edge.models.samples import Role, Turn
from qe_edge.runtime.chat_segments import ANSWER, START, WHITESPACE, WITH_PICTURE, ChatSegments
from qe_edge.system.errors import InputError

Render = Callable[[Sequence[Turn]], str]
Joints = dict[str, dict[str, str]]
MAX_WORDS = 512  # that a template may spell, each of which is tried
LITERAL = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
ODD = "a < b && \"c\" {{ d }} {% e %}\n\\n\t'f' é 😀 |x|"
OWN = "Python runs the template itself."


class _OtherFormError(Exception):
    """Why a template cannot be taken apart, as the end of a sentence."""


def chat_segments(family: ModelFamily, processor: Any) -> ChatSegments:  # noqa: ANN401 - each family has its own
    r"""The parts of a model's chat template; where they cannot write what it writes, the reason alone.

    Args:
        family: The model's family.
        processor: As its `load_processor` returns.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> chat = chat_segments(loaded.family, loaded.processor)
        >>> chat.text([Turn("user", "Is it red?")])
        '<|im_start|>user\nIs it red?<|im_end|>\n<|im_start|>assistant\n'
    """
    template = "" if family.writes_prompts else _source(processor.tokenizer)
    if template is None:
        return ChatSegments(problem="The model has no chat template.")
    if "strftime_now" in template:
        return ChatSegments(problem=f"The model's chat template writes today's date; {OWN}")
    pictures = family.picture_unit != ""

    def render(turns: Sequence[Turn]) -> str:
        return family.chat_text(processor, turns)

    try:
        found = _taken_apart(render, pictures)
        _prove(found, render, pictures)
    except (_OtherFormError, InputError) as error:
        reason = error.problem.rstrip(".") if isinstance(error, InputError) else f"The model's chat template {error}"
        return ChatSegments(problem=f"{reason}; {OWN}")
    words = _words(template, processor.tokenizer)
    if len(words) > MAX_WORDS:
        return ChatSegments(problem=f"The model's chat template spells more than {MAX_WORDS} texts; {OWN}")
    return found.model_copy(update={"refused": tuple(word for word in words if _is_special(found, render, word))})


def _source(tokenizer: Any) -> str | None:  # noqa: ANN401 - tokenizers share no typed base
    template = tokenizer.chat_template
    found = template.get("default") if isinstance(template, dict) else template
    return found if isinstance(found, str) else None


def _taken_apart(render: Render, pictures: bool) -> ChatSegments:
    joints: Joints = {}
    _learn(joints, render, "user")
    for roles in (("user", "assistant", "user"), ("system", "user"), ("user", "user")):
        with suppress(InputError):  # no place for such a turn, which the parts say too
            _learn(joints, render, *roles)
    picture, pictures_first, last = "", False, ""
    if pictures:
        first, second = _word(), _word()
        prompt = render([Turn("user", first + second, (len(first),))])
        opening, picture, _ = _split(prompt, (first, second))
        start = joints[START]["user"]
        if not picture:
            pictures_first, picture = True, opening.removeprefix(start)
        elif start != opening and start.startswith(opening):  # a part of it follows the last picture
            last = start.removeprefix(opening)
            picture, joints[START]["user"] = picture.removesuffix(last), opening
        for before in [before for before, after in joints.items() if "user" in after]:
            joint = _before_picture(render, before).removesuffix(last)
            if not joint.endswith(picture):
                raise _OtherFormError("writes pictures in several ways")
            joints[before][f"user{WITH_PICTURE}"] = joint.removesuffix(picture)
    strip = {role: _stripped(render, role) for role in ("user", "assistant", "system") if role in joints}
    return ChatSegments(joints=joints, picture=picture, pictures_first=pictures_first, last=last, strip=strip)


def _learn(joints: Joints, render: Render, *roles: Role) -> None:
    """Add what the template writes around turns of these roles."""
    words = [_word() for _ in roles]
    turns = [Turn(role, word) for role, word in zip(roles, words, strict=True)]
    parts = _split(render(turns), words)
    for (before, after), part in zip(pairwise((START, *roles, ANSWER)), parts, strict=True):
        if joints.setdefault(before, {}).setdefault(after, part) != part:
            raise _OtherFormError(
                f"writes the same turns differently {'at the end' if after == ANSWER else 'in places'}"
            )


def _before_picture(render: Render, before: str) -> str:
    """What stands before the text of a user's turn that begins with a picture."""
    word = _word()
    asked = Turn("user", word, (0,))
    if before == START:
        return _split(render([asked]), [word])[0]
    earlier = {
        "system": [Turn("system", _word())],
        "user": [Turn("user", _word())],
        "assistant": [Turn("user", _word()), Turn("assistant", _word())],
    }[before]
    return _split(render([*earlier, asked]), [earlier[-1].text, word])[1]


def _stripped(render: Render, role: Role) -> str:
    """The characters that the template takes from both ends of a role's texts."""
    word = _word()
    spaced = f"\n {word} \n"
    turns = {
        "user": [Turn("user", spaced)],
        "system": [Turn("system", spaced), Turn("user", "a")],
        "assistant": [Turn("user", "a"), Turn("assistant", spaced), Turn("user", "b")],
    }[role]
    plain = [Turn(turn.role, turn.text.strip()) for turn in turns]
    found, bare = render(turns), render(plain)
    if found == bare:
        return WHITESPACE
    if found == bare.replace(word, spaced):
        return ""
    raise _OtherFormError(f"changes the white space of a turn of the {role}")


def _prove(chat: ChatSegments, render: Render, pictures: bool) -> None:
    """Compare parts and template on conversations of every kind that the parts have a place for."""
    for turns in _conversations(pictures):
        try:
            text = chat.text(turns)
        except InputError:
            continue
        if text != render(turns):
            roles = ", ".join(turn.role + (" with pictures" if turn.marks else "") for turn in turns)
            raise _OtherFormError(f"writes another text than its parts do (turns: {roles})")


def _conversations(pictures: bool) -> Iterator[list[Turn]]:
    ask, say, rule = "What is it?", "A circle.", "Answer in one word."
    shown = [
        Turn("user", ask, (0,)),
        Turn("user", "what is  this, and that?", (8,)),
        Turn("user", "look: ", (6,)),
        Turn("user", "and these? ", (0, 0, 4)),
        Turn("user", " it ", (0, 4)),
    ]
    plain = [Turn("user", ask), Turn("user", ODD), Turn("user", f"  {ODD}\n\n")]
    for first in [*plain, *(shown if pictures else ())]:
        yield [first]
        yield [Turn("system", rule), first]
        yield [first, Turn("assistant", say), Turn("user", "Why?")]
        yield [Turn("system", f" {ODD} "), first, Turn("assistant", f"\n{ODD} "), first]
        yield [Turn("user", "Hello"), Turn("assistant", "Hi"), Turn("user", "?"), Turn("assistant", say), first]
        yield [Turn("user", "Hello"), first]


def _words(template: str, tokenizer: Any) -> list[str]:  # noqa: ANN401 - tokenizers share no typed base
    """Texts that a template spells, but special tokens, which a user's text never writes."""
    special = special_pattern(tokenizer)
    found: dict[str, None] = {}
    for match in LITERAL.finditer(template):
        try:
            word = ast.literal_eval(match.group().replace("\n", "\\n"))
        except (SyntaxError, ValueError):  # an apostrophe in running text
            continue
        if word.strip() and not special.search(word):
            found[word] = None
    return list(found)


def _is_special(chat: ChatSegments, render: Render, word: str) -> bool:
    """Whether the template treats turns that hold a word in another way than its parts do."""
    for text in (word, f"a {word} b"):
        turns = [Turn("user", text), Turn("assistant", text), Turn("user", text)]
        for conversation in (turns, [Turn("system", text), turns[0]]):
            try:
                wanted = chat.text(conversation)
            except InputError:
                continue
            try:
                if render(conversation) != wanted:
                    return True
            except InputError:
                return True
    return False


def _word() -> str:
    return f"x{secrets.token_hex(8)}x"


def _split(prompt: str, words: Sequence[str]) -> list[str]:
    """The text before, between and after words, each of which has to stand there once."""
    parts = []
    for word in words:
        before, found, prompt = prompt.partition(word)
        if not found or word in prompt:
            raise _OtherFormError("writes a turn twice, not at all, or in another order")
        parts.append(before)
    return [*parts, prompt]
