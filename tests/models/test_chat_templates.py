"""Chat templates: which file counts, and templates that refuse, loop or fill the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qe_edge.demo import model_path
from qe_edge.models import chat_templates
from qe_edge.models.family import ModelFamily
from qe_edge.system.errors import ModelError, QENotice
from tests.models.model_files import edit

TEMPLATE = (model_path() / "chat_template.jinja").read_text(encoding="utf-8")
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x='abcdefgh') %}{% for a in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "takes no pictures: Roles must alternate"),
        ("{% if %}", "takes no pictures: Expected an expression"),
        ("{{ messages[0].content.nothing.more }}", "takes no pictures: .* has no attribute 'nothing'"),
        (NESTED + TEMPLATE, "takes more than 1 seconds or 512 MiB"),
        (DOUBLED + TEMPLATE, "takes more than 1 seconds or 512 MiB"),
        ("{{ 'abc' * 9000000000 }}" + TEMPLATE, "takes more than 1 seconds or 512 MiB"),
        ("{{ 'abc' * 200000 }}" + TEMPLATE, "writes 6000.. characters around one short question"),
        ("a" * 300_000, "has 300000 bytes"),
    ],
)
def test_a_template_that_is_none(
    folder: Path, family: ModelFamily, monkeypatch: pytest.MonkeyPatch, template: str, complaint: str
) -> None:
    monkeypatch.setattr(chat_templates, "SECONDS", 1)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ModelError, match=complaint) as caught:
        family.load_processor(str(folder))
    assert "chat_template.jinja" in caught.value.remedy


def test_the_default_of_named_templates_is_used(folder: Path, family: ModelFamily) -> None:
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "{{ 1 }}"}, {"name": "default", "template": TEMPLATE}]
    edit(folder / "tokenizer_config.json", lambda table: table.update(chat_template=named))
    family.load_processor(str(folder))
    edit(
        folder / "tokenizer_config.json", lambda table: table.update(chat_template=[named[0], named[0] | {"name": "b"}])
    )
    with pytest.raises(ModelError, match="are named 'tools', 'b', and none is 'default'") as caught:
        family.load_processor(str(folder))
    assert "'default'" in caught.value.remedy


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_of_an_older_model_is_found(folder: Path, family: ModelFamily, name: str) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="has no chat template"):
        family.load_processor(str(folder))
    (folder / name).write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    assert family.load_processor(str(folder)).tokenizer.chat_template == TEMPLATE
    (folder / name).write_text(json.dumps({"chat_template": [TEMPLATE]}), encoding="utf-8")
    with pytest.raises(ModelError, match=f"Key 'chat_template' of .*{name}"):
        family.load_processor(str(folder))


def test_two_different_templates_are_told(folder: Path, family: ModelFamily) -> None:
    other = TEMPLATE.replace("assistant", "helper")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": other}), encoding="utf-8")
    with pytest.warns(QENotice, match="several chat templates; that of chat_template.json is used"):
        assert family.load_processor(str(folder)).tokenizer.chat_template == other


def test_a_template_that_refuses_a_certain_question_ends_in_a_sentence(folder: Path, family: ModelFamily) -> None:
    tokenizer = family.load_processor(str(folder)).tokenizer
    tokenizer.chat_template = "{{ raise_exception('no') if 'secret' in messages[0].content else 'yes' }}"
    assert chat_templates.render_question(tokenizer, "hello") == "yes"
    with pytest.raises(ModelError, match="refuses a question: no"):
        chat_templates.render_question(tokenizer, "a secret")
