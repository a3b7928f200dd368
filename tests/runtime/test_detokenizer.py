"""Text while it grows: the pieces are the whole, no piece has half a character, and no stop string comes through."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qe_edge.demo import model_path
from qe_edge.runtime.detokenizer import Detokenizer, StopStrings
from qe_edge.system.errors import InputError

UNKNOWN, END = "<unk>", "</s>"


def sentencepiece_style() -> PreTrainedTokenizerFast:
    """Llama 2's kind: spaces are "\u2581", the first one is stripped, bytes stand for characters that are no token."""
    words = [
        UNKNOWN,
        END,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581a",
        "b",
        ".",
        "\u2581caf\u00e9",
        "!",
    ]
    core = Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, [], unk_token=UNKNOWN, byte_fallback=True)
    )
    core.normalizer = normalizers.Replace(" ", "\u2581")
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, unk_token=UNKNOWN)


def tidying() -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.clean_up_tokenization_spaces = True
    return tokenizer


TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {
    "byte-level": AutoTokenizer.from_pretrained(model_path()),
    "sentencepiece-style": sentencepiece_style(),
    "tidying": tidying(),
}


def pieces(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
@settings(max_examples=60)
def test_pieces_are_the_whole(kind: str, data: st.DataObject) -> None:
    """Of any tokens: special ones, and parts of characters."""
    tokenizer = TOKENIZERS[kind]
    single_bytes = 258 if kind == "sentencepiece-style" else 0  # wrong ones, which it decodes together, come below
    ids = data.draw(st.lists(st.integers(single_bytes, len(tokenizer) - 1), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30))
@settings(max_examples=60)
def test_no_piece_has_half_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    found = pieces(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert ["\ufffd" in piece for piece in found].count(True) <= text.count("\ufffd")
    assert "".join(found) == tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["sentencepiece-style"]
    ids = tokenizer("a\U0001f600b", add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids)
    assert [piece for piece in found if piece] == ["a", "\U0001f600", "b"]
    assert found.index("\U0001f600") == ids.index(tokenizer.convert_tokens_to_ids("<0x80>"))


def test_bytes_that_are_no_character() -> None:
    tokenizer = TOKENIZERS["sentencepiece-style"]
    ids = tokenizer.convert_tokens_to_ids(["<0x41>", "<0xC3>", "<0xC3>", "b"])
    assert pieces(tokenizer, ids) == ["A", "", "", "\ufffd\ufffdb", ""]
    assert pieces(tokenizer, ids[:3]) == ["A", "", "", "\ufffd\ufffd"]


def test_few_tokens_are_decoded_again() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    sizes: list[int] = []

    class Counting:
        def decode(self, ids: list[int], **options: bool) -> str:
            sizes.append(len(ids))
            return str(tokenizer.decode(ids, **options))

    detokenizer = Detokenizer(Counting())
    for token in tokenizer("what color is the shape? " * 20)["input_ids"]:
        detokenizer.add(token)
    assert max(sizes) <= 4


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 5))
@settings(max_examples=200)
def test_text_ends_where_the_first_stop_string_begins(text: str, stops: list[str], size: int) -> None:
    """Whatever the pieces: a stop string that begins earlier wins only if it is whole first."""
    stopping = StopStrings(stops)
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    given_parts: list[str] = []
    for number, part in enumerate(parts):
        given_parts.append(stopping.add(part))
        so_far = "".join(parts[: number + 1])
        whole = [so_far.find(stop) for stop in stops if stop in so_far]
        assert stopping.found == bool(whole)
        if whole:
            assert "".join(given_parts) == so_far[: min(whole)]
            assert stopping.add("more") == stopping.finish() == ""
            return
        assert so_far.startswith("".join(given_parts))
    assert "".join(given_parts) + stopping.finish() == text


@pytest.mark.parametrize("stops", [[""], ["a" * 2000], ["a"] * 17, ["a\0b"], [3]])
def test_stop_strings_that_are_none(stops: list[str]) -> None:
    with pytest.raises(InputError, match="stop string"):
        StopStrings(stops)
