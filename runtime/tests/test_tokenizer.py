"""The C++ tokenizer gives the ids and the text of the library `tokenizers`, or refuses a tokenizer in two sentences."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qe_edge import demo
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from texts import every_character, odd_texts

ROOT = Path(__file__).parents[2]
SPECIAL = ["<|end|>", "<|image|>", "<s>"]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(
    tokenizer: Tokenizer, *before: pre_tokenizers.PreTokenizer, own_pattern: bool = False
) -> trainers.BpeTrainer:
    """GPT-2's alphabet of bytes, after the steps `before`."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_pattern)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)


def smollm2(tokenizer: Tokenizer) -> trainers.BpeTrainer:
    """Single digits, then GPT-2's pattern."""
    return byte_level(tokenizer, pre_tokenizers.Digits(individual_digits=True), own_pattern=True)


def qwen2(tokenizer: Tokenizer) -> trainers.BpeTrainer:
    """NFC, then a pattern of its own."""
    tokenizer.normalizer = normalizers.NFC()
    return byte_level(tokenizer, pre_tokenizers.Split(Regex(QWEN), "isolated"))


def llama3(tokenizer: Tokenizer) -> trainers.BpeTrainer:
    """Digits in threes, and a token of its own at the start."""
    frame = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), frame])
    return byte_level(tokenizer, pre_tokenizers.Split(Regex(LLAMA3), "isolated"))


def sentence_pieces(tokenizer: Tokenizer, *strip: decoders.Decoder) -> trainers.BpeTrainer:
    """Bytes as tokens where no token has a character."""
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *SPECIAL, *BYTES], show_progress=False)


def llama2(tokenizer: Tokenizer) -> trainers.BpeTrainer:
    """A mark before every text, no words."""
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return sentence_pieces(tokenizer, decoders.Strip(" ", 1, 0))


def gemma(tokenizer: Tokenizer) -> trainers.BpeTrainer:
    """Marks for spaces alone; splits at spaces that are not there any more."""
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return sentence_pieces(tokenizer)


def metaspace(tokenizer: Tokenizer) -> trainers.BpeTrainer:
    """Words that begin with a mark, the first one too; what has no token is unknown."""
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", *SPECIAL], show_progress=False)


KINDS: dict[str, Callable[[Tokenizer], trainers.BpeTrainer]] = {
    kind.__name__: kind for kind in (smollm2, qwen2, llama3, llama2, gemma, metaspace)
}


def made(kind: str, folder: Path) -> Path:
    """A tokenizer.json of a kind, trained on the documentation."""
    fallback = kind in ("llama2", "gemma")
    model = models.BPE(
        unk_token="<unk>" if fallback or kind == "metaspace" else None,
        fuse_unk=kind != "smollm2",
        byte_fallback=fallback,
        ignore_merges=kind == "llama3",
    )
    tokenizer = Tokenizer(model)
    trainer = KINDS[kind](tokenizer)
    tokenizer.train([str(path) for path in sorted((ROOT / "docs").glob("*.md"))], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("word", single_word=True, rstrip=True)])
    tokenizer.add_tokens([AddedToken("\u212bngstr\u00f6m", normalized=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def compare(program: Path, path: Path, texts: list[str], mode: str = "") -> None:
    """Ids, text and streamed text of all texts, in C++ and in Python."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = mode == "special-as-text"
    lines = "\n".join(map(json.dumps, texts)) + "\n"
    command = [program, path, *([mode] if mode else [])]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    answers = done.stdout.decode().split("\n")[:-1]
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=mode == "frame").ids
        spoken = tokenizer.decode(ids)
        assert json.loads(answer) == [ids, spoken, spoken], text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_texts_have_the_same_tokens_and_tokens_the_same_text(kind: str, build: Path, tmp_path: Path) -> None:
    path = made(kind, tmp_path)
    texts = odd_texts(600, [*SPECIAL, "<tool>", "word", "\u00c5ngstr\u00f6m", "A\u030angstro\u0308m"])
    texts += [(ROOT / "README.md").read_text(), Path(__file__).read_text()]
    for mode in ("", "special-as-text", "frame"):
        compare(build / "tests/tokenize", path, texts, mode)


def test_the_demo_has_the_same_tokens(build: Path) -> None:
    questions = [json.loads(line)["question"] for line in demo.evaluation_path().read_text().splitlines()]
    path = demo.model_path() / "tokenizer.json"
    compare(build / "tests/tokenize", path, questions + odd_texts(1000, ["<|im_end|>", "<|image_pad|>"]))


def test_every_character_is_classified_as_python_does(build: Path, tmp_path: Path) -> None:
    compare(build / "tests/tokenize", made("qwen2", tmp_path), every_character())


CHANGES: list[tuple[str, Any, str]] = [
    ("normalizer", {"type": "Lowercase"}, "normalizer 'Lowercase'"),
    ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer 'Whitespace'"),
    ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "decoder 'WordPiece'"),
    ("decoder", None, "decoder ''"),
    ("decoder", {"type": "Strip", "content": "", "start": 1 << 62, "stop": 0}, "decoder 'Strip'"),
    ("post_processor", {"type": "BertProcessing"}, "post-processor 'BertProcessing'"),
    ("model", {"type": "Unigram", "vocab": []}, "type 'Unigram'"),
    ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}, "'ab', which is not in its vocabulary"),
    ("model", {"type": "BPE", "vocab": {"a": "b"}, "merges": []}, "missing or of another kind"),
    ("model", [], "holds no tokenizer"),
    ("added_tokens", [{"id": -1, "content": "x"}], "wrong number or text"),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}, "'('"),
    (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "[a&&b]"}, "behavior": "Isolated", "invert": False},
        "[a&",
    ),
]


@pytest.mark.parametrize(("key", "value", "said"), CHANGES, ids=lambda value: str(value)[:30])
def test_what_changes_tokens_and_is_not_known_is_refused(
    key: str, value: object, said: str, build: Path, tmp_path: Path
) -> None:
    table = json.loads((demo.model_path() / "tokenizer.json").read_text())
    table[key] = value
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(table))
    done = subprocess.run([build / "tests/tokenize", path], input=b"", capture_output=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr.decode()
    assert done.stderr.decode().count(". ") >= 1  # what is wrong, and what to do


def test_text_that_is_not_utf8_is_refused(build: Path) -> None:
    command = [build / "tests/tokenize", demo.model_path() / "tokenizer.json", "raw"]
    done = subprocess.run(command, input=b"a\xff", capture_output=True, check=False)
    assert done.returncode == 1
    assert "A text is not UTF-8: byte 1 is wrong." in done.stderr.decode()


def test_a_normalizer_that_fills_the_memory_is_refused(build: Path, tmp_path: Path) -> None:
    table = json.loads((demo.model_path() / "tokenizer.json").read_text())
    grow = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 200}
    table["normalizer"] = {"type": "Sequence", "normalizers": [grow] * 8}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(table))
    done = subprocess.run([build / "tests/tokenize", path, "raw"], input=b"a", capture_output=True, check=False)
    assert done.returncode == 1
    assert "becomes longer than 67108864 bytes when it is normalized" in done.stderr.decode()
