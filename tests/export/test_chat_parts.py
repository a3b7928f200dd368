from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from qe_edge.demo import model_path
from qe_edge.export.chat_parts import chat_segments
from qe_edge.models.chat import render_turns
from qe_edge.models.samples import Turn
from qe_edge.runtime.chat_segments import WHITESPACE, ChatSegments
from qe_edge.system.errors import InputError

TURNS = "{% for m in messages %}"
QWEN2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for message in rest -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '[turn]' + role + '\n' + (first if loop.first else '') }}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<|image_pad|>' }}{%- else -%}{{ item['text'] | trim }}{%- endif -%}"
    "{%- endfor -%}{{ '[end]\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '[turn]model\n' }}{%- endif -%}"
)
SMOLVLM = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}<|image_pad|>{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
LLAVA = (
    TURNS + "[{{ m.role }}]{% for c in m.content if c.type == 'image' %}<|image_pad|>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}{% endfor %}[assistant]"
)
QWEN3 = (
    TURNS
    + "<|im_start|>{{ m.role }}\n{%- set text = m.content %}{%- if m.role == 'assistant' and '</think>' in text %}"
    "{%- set text = text.split('</think>')[-1] %}{%- endif %}\n"
    "{{ text }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def taken_apart(template: str | None, *, pictures: bool = True) -> ChatSegments:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = template
    family: Any = SimpleNamespace(
        picture_unit="patches" if pictures else "",
        writes_prompts=False,
        chat_text=lambda processor, turns: render_turns(processor.tokenizer, turns, as_parts=pictures),
    )
    return chat_segments(family, SimpleNamespace(tokenizer=tokenizer))


def test_a_default_system_text_stands_before_a_first_question() -> None:
    chat = taken_apart(QWEN2_VL)
    assert chat.problem is None
    assert chat.picture == "<|vision_start|><|image_pad|><|vision_end|>"
    assert "helpful" in chat.text([Turn("user", "What?", (0,))])
    assert "helpful" not in chat.text([Turn("system", "Be brief."), Turn("user", "What?")])
    assert chat.refused == ()


def test_a_system_text_inside_the_first_question_and_stripped_texts() -> None:
    chat = taken_apart(GEMMA3)
    assert chat.problem is None
    assert chat.text([Turn("system", "Be brief. "), Turn("user", " What? ", (7,))]) == (
        "[turn]user\nBe brief. \n\nWhat?<|image_pad|>[end]\n[turn]model\n"
    )
    assert chat.strip == {"user": WHITESPACE, "assistant": WHITESPACE, "system": ""}
    with pytest.raises(InputError, match="no place for a turn of the user after a turn of the user"):
        chat.text([Turn("user", "a"), Turn("user", "b")])


def test_a_turn_that_begins_with_a_picture_is_opened_in_another_way() -> None:
    chat = taken_apart(SMOLVLM)
    assert chat.problem is None
    assert chat.text([Turn("user", "a", (0,))]).startswith("<|im_start|>User:<|image_pad|>a")
    assert chat.text([Turn("user", "a", (1,))]).startswith("<|im_start|>User: a<|image_pad|>")


def test_pictures_may_stand_before_all_text() -> None:
    chat = taken_apart(LLAVA)
    assert (chat.problem, chat.picture, chat.pictures_first) == (None, "<|image_pad|>\n", True)
    assert chat.text([Turn("user", "a b", (2, 3))]) == "[user]<|image_pad|>\n<|image_pad|>\na b[assistant]"


def test_texts_that_the_template_asks_for_are_refused() -> None:
    chat = taken_apart(QWEN3, pictures=False)
    assert (chat.problem, chat.refused) == (None, ("</think>",))
    with pytest.raises(InputError, match=r"treats '</think>' in a turn in a way of its own"):
        chat.text([Turn("user", "Why?"), Turn("assistant", "<think>hm</think>So."), Turn("user", "So?")])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        (TURNS + "{{ strftime_now('%d') }}{{ m.content }}{% endfor %}", "writes today's date"),
        (TURNS + "{{ loop.index }}. {{ m.role }}: {{ m.content }}\n{% endfor %}A:", "another text than its parts do"),
        (TURNS + "{{ m.content }}|{{ m.content }}{% endfor %}", "writes a turn twice"),
        (TURNS + "{{ m.content | replace('x', 'y') }}{% endfor %}", "writes a turn twice, not at all"),
        (TURNS + "{{ m.content.lstrip() }}\n{% endfor %}", "changes the white space"),
    ],
)
def test_what_parts_cannot_write_is_said(template: str | None, reason: str) -> None:
    chat = taken_apart(template, pictures=False)
    assert chat.problem is not None
    assert any(part in chat.problem for part in reason.split("|")), chat.problem
    with pytest.raises(InputError):
        chat.text([Turn("user", "a")])
