"""Tokenizers as downloads and fine-tuning leave them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qe_edge.models.family import ModelFamily
from qe_edge.models.tokenizers import load_tokenizer
from qe_edge.system.errors import ModelError, QENotice
from tests.models.model_files import SAMPLES, Edit, edit

ROWS = 512


def _token(number: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": True, **flags}


def _add(*tokens: tuple[int, str]) -> Edit:
    return lambda table: table["added_tokens"].extend(_token(*token) for token in tokens)


def _put(**values: object) -> Edit:
    return lambda table: table.update(values)


def _normalize(*steps: dict[str, Any]) -> Edit:
    return _put(normalizer={"type": "Sequence", "normalizers": list(steps)})


GROWING = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 40}


@pytest.mark.parametrize(
    ("name", "change", "complaint", "remedy"),
    [
        (
            "tokenizer.json",
            _add(*((390 + number, f"<extra {number}>") for number in range(130))),
            "Token '<extra 129>' of .* has number 519; the embedding has 512 rows",
            "Resize the model's embedding",
        ),
        ("tokenizer.json", _add((505, "<far>")), "number 505 in tokenizer.json and 390", "without gaps"),
        ("tokenizer.json", _add((2**40, "<far>")), "added_tokens.8.id", "Copy tokenizer.json"),
        ("tokenizer.json", _put(added_tokens=None), "Key 'added_tokens' of .*tokenizer.json", "Copy tokenizer.json"),
        ("tokenizer.json", _put(model={"type": "Magic", "vocab": {}}), "cannot be used", "Copy tokenizer.json"),
        ("tokenizer.json", _put(model={"vocab": 7}), "Key 'model.vocab' of", "Copy tokenizer.json"),
        ("tokenizer.json", _put(decoder={"type": "Nope"}), "cannot be used", "Copy tokenizer.json"),
        ("tokenizer.json", _normalize(GROWING, GROWING), "texts that are too long", "Copy tokenizer.json"),
        ("tokenizer_config.json", _put(**{"eos_token": "<|stop|>"}), "'eos_token' of .* is '<|stop|>', which", "Copy"),
        ("tokenizer_config.json", _put(eos_token=["x"]), "Key 'eos_token' of", "Copy"),
        ("tokenizer_config.json", _put(model_max_length=-1), "Key 'model_max_length' of", "Copy"),
        ("tokenizer_config.json", _put(added_tokens_decoder={"x": {}}), "added_tokens_decoder", "Copy"),
        ("tokenizer_config.json", _put(extra_special_tokens=3), "cannot be used", "Copy"),
        (
            "tokenizer_config.json",
            _put(fast_tokenizer_files=["../tokenizer.4.0.0.json"]),
            "names other files to read with 'fast_tokenizer_files'",
            "Remove that key",
        ),
        ("tokenizer_config.json", _put(convert_tokens_to_ids=1), "is no setting", "Copy"),
    ],
)
def test_a_tokenizer_that_the_model_cannot_take(
    folder: Path, name: str, change: Edit, complaint: str, remedy: str
) -> None:
    edit(folder / name, change)
    with pytest.raises(ModelError, match=complaint.replace("|", r"\|")) as caught:
        load_tokenizer(str(folder), ROWS)
    assert remedy in caught.value.remedy


def _split(folder: Path, *, vocabulary: bool = True, merges: bool = True) -> None:
    """The older files in place of tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", _put(tokenizer_class="Qwen2Tokenizer"))
    if vocabulary:
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    if merges:
        lines = [" ".join(pair) for pair in model["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")


def test_older_files_are_converted(folder: Path) -> None:
    whole = load_tokenizer(str(folder), ROWS)
    _split(folder)
    text = "what shape is in the image?"
    assert load_tokenizer(str(folder), ROWS)(text)["input_ids"] == whole(text)["input_ids"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: _split(folder, merges=False), "missing: tokenizer.json and merges.txt"),
        (lambda folder: _split(folder, vocabulary=False), "missing: tokenizer.json and vocab.json"),
        (lambda folder: _split(folder, vocabulary=False, merges=False), "missing: tokenizer.json."),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json is missing"),
        (lambda folder: (folder / "special_tokens_map.json").write_text("[]"), "special_tokens_map.json' holds no"),
        (lambda folder: (folder / "added_tokens.json").write_text('{"a": "b"}'), "added_tokens.json' names a token"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff"), "tokenizer.json' is not UTF-8"),
    ],
)
def test_a_file_that_is_missing_or_broken_is_named(
    folder: Path, spoil: Callable[[Path], object], complaint: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=complaint):
        load_tokenizer(str(folder), ROWS)


def test_a_panic_of_the_library_is_a_sentence_without_its_report(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    edit(folder / "tokenizer.json", lambda table: table["model"].update(continuing_subword_prefix="a long prefix"))
    with pytest.raises(ModelError, match="cannot be used: range end index"):
        load_tokenizer(str(folder), ROWS)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_an_end_token_is_taken_from_the_models_configuration(folder: Path, where: str) -> None:
    edit(folder / "tokenizer_config.json", lambda table: table.pop("eos_token"))
    if where == "config.json":
        (folder / "generation_config.json").unlink()
    with pytest.warns(QENotice, match=r"names no end token; '<\|im_end\|>' is taken"):
        assert load_tokenizer(str(folder), ROWS).eos_token_id == 2


def test_a_model_that_names_no_end_token_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda table: table.pop("eos_token"))
    edit(folder / "config.json", lambda table: table["text_config"].pop("eos_token_id"))
    (folder / "generation_config.json").unlink()
    with pytest.raises(ModelError, match="names no end token") as caught:
        load_tokenizer(str(folder), ROWS)
    assert "'eos_token'" in caught.value.remedy


def test_padding_with_the_pictures_token_is_no_picture(folder: Path, family: ModelFamily) -> None:
    edit(folder / "tokenizer_config.json", _put(**{"pad_token": "<|image_pad|>"}))
    processor = family.load_processor(str(folder))
    assert processor.tokenizer.pad_token_id == family.config.image_token_id
    sample = SAMPLES["qwen2_vl"]
    long, short = family.encode(processor, [sample]), family.encode(processor, [sample, type(sample)(None, "a")])
    assert short.image_mask.sum() == long.image_mask.sum() > 0
    assert not short.image_mask[short.attention_mask == 0].any()
