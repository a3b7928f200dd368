"""A byte-level tokenizer as llama.cpp reads it: tokens, their kinds, merges, and the name of its way to split text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from qe_edge.checkpoint.files import REMEDY
from qe_edge.formats.base import Reason
from qe_edge.models.guard import Guard
from qe_edge.system.errors import ArtifactError
from qe_edge.system.json_files import read_json_table

TOKENIZER = "tokenizer.json"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {  # llama.cpp's name by the expression that cuts text into words
    WORDS % r"\p{N}": "qwen2",
    WORDS % r"\p{N}{1,3}": "llama-bpe",
    "": "gpt-2",  # the one that ByteLevel has itself
}


def tokenizer_problem(folder: Path) -> Reason | None:
    """Why llama.cpp cannot have a model's tokenizer; None if it can.

    Example:
        >>> from qe_edge.demo import model_path
        >>> tokenizer_problem(model_path()) is None, tokenizer_problem(Path())[0]
        (True, "there is no 'tokenizer.json'")
    """
    remedy = "Convert to compressed-tensors or gptq, which keep the tokenizer as it is."
    path = folder / TOKENIZER
    if not path.is_file():
        return f"there is no '{TOKENIZER}'", remedy
    values = read_json_table(path)
    with _guard(folder):
        if values["model"].get("type") != "BPE" or values["model"].get("byte_fallback") or _split(values) is None:
            return "its tokenizer is none of the byte-level ones of Llama 3, Qwen and GPT-2", remedy
    return None


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, size: int) -> None:
    """Write the tokenizer of a folder that `tokenizer_problem` has accepted.

    Args:
        writer: Of the file.
        folder: With tokenizer.json, tokenizer_config.json and the chat template.
        size: Rows of the embedding; rows without a token get one that is never used.

    Example:
        >>> writer = gguf.GGUFWriter("model.gguf", "llama")  # doctest: +SKIP
        >>> add_vocabulary(writer, Path("checkpoint"), size=49_152)  # doctest: +SKIP
    """
    values = read_json_table(folder / TOKENIZER)
    with _guard(folder):
        tokens = [f"[PAD{number}]" for number in range(size)]
        kinds = [gguf.TokenType.UNUSED] * size
        for token, number in values["model"]["vocab"].items():
            tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
        for added in values.get("added_tokens", []):
            kind = gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
            tokens[added["id"]], kinds[added["id"]] = added["content"], kind
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_split(values) or "")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def _guard(folder: Path) -> Guard:
    return Guard(f"The tokenizer or chat template of '{folder}' cannot be read", REMEDY, ArtifactError)


def _split(values: dict[str, Any]) -> str | None:
    """llama.cpp's name of how text is cut into words; None if it has none."""
    before = values.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    expressions = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(levels) != 1 or len(expressions) + 1 != len(steps) or levels[0].get("add_prefix_space"):
        return None
    if bool(levels[0].get("use_regex", True)) != (not expressions) or len(expressions) > 1:
        return None
    return SPLITS.get(expressions[0] if expressions else "")
