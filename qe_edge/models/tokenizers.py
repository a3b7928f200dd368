"""Load a tokenizer as downloads and fine-tuning leave it; a tokenizer that does not fit the model is refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qe_edge.models.chat_templates import MAX_TEMPLATE, check_template_files
from qe_edge.models.configuration import read_config_values
from qe_edge.models.generation_files import read_generation_config
from qe_edge.models.guard import Guard, check_key_names, check_values
from qe_edge.models.model_files import find_file
from qe_edge.system.c_output import without_panic_report
from qe_edge.system.errors import ModelError, QENotice, printable
from qe_edge.system.json_files import read_json_table
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import transformers
else:
    transformers = lazy_module("transformers")

REMEDY = "Copy tokenizer.json and tokenizer_config.json from the original model."
OLDER_REMEDY = (
    "Load the tokenizer with transformers, sentencepiece and tiktoken installed, and save it as tokenizer.json."
)
UNTRAINED = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")  # never asked of the model
MAX_TOKENIZER = 64 * 2**20  # bytes; the largest known tokenizer.json has 33 million
MAX_GROWTH = 256  # how many times longer a normalizer may make a text
PROBE = "The quick brown fox, 123.\n\t\u00e9\u4e2d\U0001f600"

TokenId = Annotated[int, Field(strict=True, ge=0, le=2**21)]
Content = Annotated[str, Field(min_length=1, max_length=1024)]


class _Token(BaseModel):
    model_config = ConfigDict(extra="allow")
    content: Content


class _AddedToken(_Token):
    id: TokenId


class _NamedTemplate(BaseModel):
    name: str
    template: Annotated[str, Field(max_length=MAX_TEMPLATE)]


class _TokenizerFile(BaseModel):
    """tokenizer.json, as far as transformers itself reads it; the library tokenizers checks the rest."""

    model_config = ConfigDict(extra="allow")
    added_tokens: Annotated[list[_AddedToken], Field(max_length=2**17)]
    model: dict[str, Any]


class _TokenizerConfig(BaseModel):
    """tokenizer_config.json."""

    model_config = ConfigDict(extra="allow")
    chat_template: Annotated[str, Field(max_length=MAX_TEMPLATE)] | list[_NamedTemplate] | dict[str, str] | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]{1,7}$")], _Token] | None = None
    model_max_length: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    model_input_names: list[str] | None = None
    eos_token: Content | _Token | None = None
    bos_token: Content | _Token | None = None
    pad_token: Content | _Token | None = None
    unk_token: Content | _Token | None = None


def load_tokenizer(source: str, vocabulary: int) -> Any:  # noqa: ANN401 - tokenizers share no typed base
    """Load the tokenizer of a model.

    A tokenizer that names no end token takes it from generation_config.json or config.json, with a notice.

    Args:
        source: Folder or hub id.
        vocabulary: Rows of the model's embedding.

    Raises:
        ModelError: If a file is missing or broken, if a token is outside the embedding, or if no end token is named.

    Example:
        >>> from qe_edge.demo import model_path
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> tokenizer.decode(tokenizer("is it red?")["input_ids"]), tokenizer.eos_token
        ('is it red?', '<|im_end|>')
    """
    tokens = check_tokenizer_files(source)
    remedy = OLDER_REMEDY if tokens is None else REMEDY
    with Guard(f"The tokenizer of '{source}' cannot be used", remedy), without_panic_report():
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        ids = list(tokenizer(PROBE)["input_ids"])
        tokenizer.decode(ids, skip_special_tokens=True)
        known = dict(tokenizer.get_vocab())
    if not ids:
        raise ModelError(f"The tokenizer of '{source}' makes no tokens of a text.", REMEDY)
    token, highest = max(known.items(), key=lambda item: item[1])
    if max(highest, *ids) >= vocabulary:
        raise ModelError(
            f"Token '{printable(token)[:60]}' of '{source}' has number {highest}; the embedding has {vocabulary} rows.",
            "Resize the model's embedding to its tokenizer and save both, or use the original model's tokenizer.",
        )
    if tokens is not None:
        _check_numbers(tokenizer, tokens, source)
    if tokenizer.eos_token_id is None:
        _take_end_token(tokenizer, source, set(known.values()))
    return tokenizer


def check_tokenizer_files(source: str) -> dict[str, int | None] | None:
    """Check every file of a tokenizer before the libraries read it.

    Returns:
        Number of every added token of tokenizer.json, None for the tokens of its model; None without such a file.

    Example:
        >>> from qe_edge.demo import model_path
        >>> check_tokenizer_files(str(model_path()))["<|im_end|>"] is not None  # an added token, with its number
        True
    """
    tables = {
        name: read_json_table(path, error=ModelError, remedy=REMEDY, limit=MAX_TOKENIZER)
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "vocab.json",
        )
        if (path := find_file(source, name))
    }
    folder = Path(source)
    if "tokenizer_config.json" not in tables:
        raise ModelError(f"'{source}' has no usable tokenizer: tokenizer_config.json is missing.", REMEDY)
    if "tokenizer.json" in tables:
        check_values(_TokenizerFile, tables["tokenizer.json"], folder / "tokenizer.json", REMEDY, ModelError)
        _check_growth(tables["tokenizer.json"], folder / "tokenizer.json")
    else:
        _check_older_files(source, "vocab.json" in tables)
    config = tables["tokenizer_config.json"]
    if "fast_tokenizer_files" in config:  # transformers reads what it names, be it anywhere on the disk
        raise ModelError(
            f"'{folder / 'tokenizer_config.json'}' names other files to read with 'fast_tokenizer_files'.",
            "Remove that key, and keep the tokenizer in tokenizer.json.",
        )
    check_values(_TokenizerConfig, config, folder / "tokenizer_config.json", REMEDY, ModelError)
    for number in tables.get("added_tokens.json", {}).values():
        if type(number) is not int or not 0 <= number < 2**21:
            raise ModelError(f"'{folder / 'added_tokens.json'}' names a token without a number.", REMEDY)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        check_key_names(transformers.PreTrainedTokenizerFast, tables.get(name, {}), folder / name, REMEDY, ModelError)
    check_template_files(source)
    if "tokenizer.json" not in tables:
        return None
    vocabulary = tables["tokenizer.json"]["model"].get("vocab")
    if not isinstance(vocabulary, dict | list):
        raise ModelError(f"Key 'model.vocab' of '{folder / 'tokenizer.json'}' is no vocabulary.", REMEDY)
    names = [entry[0] if isinstance(entry, list) and entry else entry for entry in vocabulary]
    added = {token["content"]: token["id"] for token in tables["tokenizer.json"]["added_tokens"]}
    return {**{name: None for name in names if isinstance(name, str)}, **added}


def _check_numbers(tokenizer: Any, tokens: dict[str, int | None], source: str) -> None:  # noqa: ANN401
    """Refuse special tokens that tokenizer.json lacks: the library would number them anew, for rows nobody trained."""
    for name, token in tokenizer.special_tokens_map.items():
        if name not in UNTRAINED and str(token) not in tokens:
            raise ModelError(
                f"'{name}' of '{source}' is '{printable(str(token))[:60]}', which tokenizer.json does not have.", REMEDY
            )
    for token, number in tokens.items():
        found = None if number is None else tokenizer.convert_tokens_to_ids(token)
        if found != number:
            raise ModelError(
                f"Token '{printable(token)[:60]}' of '{source}' has number {number} in tokenizer.json and {found} when "
                "it is loaded.",
                "Number added tokens on from the last one, without gaps.",
            )


def _check_older_files(source: str, has_vocabulary: bool) -> None:
    """Refuse a model without tokenizer.json and without all of the older files: transformers makes it an empty one."""
    merges, model = find_file(source, "merges.txt"), find_file(source, "tokenizer.model")
    if model is not None or (has_vocabulary and merges is not None):
        return
    missing = "tokenizer.json"
    if has_vocabulary or merges is not None:
        missing += f" and {'merges.txt' if has_vocabulary else 'vocab.json'}"
    raise ModelError(f"'{source}' has no usable tokenizer; missing: {missing}.", REMEDY)


def _check_growth(table: dict[str, Any], path: Path) -> None:
    """Refuse a normalizer that makes long texts of short ones."""
    replaced = [
        len(node["content"]) for node in _nodes(table) if isinstance(node.get("content"), str) and "pattern" in node
    ]
    prepended = [len(node["prepend"]) for node in _nodes(table) if isinstance(node.get("prepend"), str)]
    if math.prod(max(1, length) for length in [*replaced, *prepended]) > MAX_GROWTH:
        raise ModelError(f"'{path}' replaces characters by texts that are too long.", REMEDY)


def _nodes(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every table in the parts of tokenizer.json that change a text."""
    open_nodes: list[Any] = [table.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, dict):
            yield node
            open_nodes += node.values()
        elif isinstance(node, list):
            open_nodes += node


def _take_end_token(tokenizer: Any, source: str, known: set[int]) -> None:  # noqa: ANN401
    """Give a tokenizer the end token that generation_config.json or config.json names."""
    generation = read_generation_config(source)
    values = read_config_values(source)
    named = [
        None if generation is None else generation.eos_token_id,
        values.get("eos_token_id"),
        (values.get("text_config") or {}).get("eos_token_id"),
    ]
    found = next((ids for ids in named if ids is not None), None)
    number = found[0] if isinstance(found, list) and found else found
    if number not in known:
        raise ModelError(
            f"The tokenizer of '{source}' names no end token.", "Write 'eos_token' into tokenizer_config.json."
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(number)
    warnings.warn(
        f"The tokenizer of '{source}' names no end token; '{tokenizer.eos_token}' is taken, as the model's "
        "configuration says.",
        QENotice,
        stacklevel=2,
    )
