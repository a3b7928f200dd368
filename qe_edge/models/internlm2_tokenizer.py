"""The tokenizer of InternLM2 from its `tokenizer.model`, without its own code and without sentencepiece.

The file is a SentencePiece model of byte-pair encoding. What its code does on top is in tokenizer_config.json: pieces
that are renamed to special tokens, and tokens after the last piece.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped] # it ships no types
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from qe_edge.models.guard import Guard
from qe_edge.system.errors import ModelError
from qe_edge.system.json_files import read_bounded_bytes

REMEDY = "Copy tokenizer.model and tokenizer_config.json from the original model."
MAX_FILE = 16 * 2**20  # bytes; InternLM2's has 1.5 million
BYTE_PAIRS = 2  # model_type of the file
SPACE = "\u2581"  # how a piece spells a space
SPECIAL = ("<unk>", "<s>", "</s>")  # what the first three pieces are called


def read_internlm2_tokenizer(path: Path, added: dict[str, Any]) -> Any:  # noqa: ANN401 - tokenizers ships no types
    """A `tokenizers.Tokenizer`.

    Args:
        path: `tokenizer.model`.
        added: `added_tokens_decoder` of tokenizer_config.json: by id, tables with `content` and perhaps `special`.

    Raises:
        ModelError: If the file is too large, is damaged, or holds no byte-pair encoding.

    Example:
        >>> tokenizer = read_internlm2_tokenizer(Path("InternVL2-2B/tokenizer.model"), added={})  # doctest: +SKIP
        >>> tokenizer.encode("is it red?").tokens  # doctest: +SKIP
    """
    data = read_bounded_bytes(path, error=ModelError, remedy=REMEDY, limit=MAX_FILE)
    with Guard(f"'{path}' cannot be read", REMEDY):
        found = import_protobuf().ModelProto()
        try:
            found.ParseFromString(data)
        except DecodeError as error:
            raise ModelError(f"'{path}' is no SentencePiece model: {error}.", REMEDY) from error
        if found.trainer_spec.model_type != BYTE_PAIRS:
            raise ModelError(f"'{path}' holds no byte-pair encoding.", REMEDY)
        pieces = [(piece.piece, piece.score) for piece in found.pieces]
        pieces[: len(SPECIAL)] = [(piece, 0.0) for piece in SPECIAL]
        tokens = {int(number): token for number, token in added.items()}
        pieces = [(tokens[n]["content"] if n in tokens else piece, score) for n, (piece, score) in enumerate(pieces)]
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        merges = generate_merges(vocabulary, pieces)
        tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
        prefix = found.normalizer_spec.add_dummy_prefix
        spaces = normalizers.Replace(" ", SPACE)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if prefix else [spaces])
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
        for number, token in sorted(tokens.items()):
            one = AddedToken(token["content"], normalized=False, special=bool(token.get("special", True)))
            (tokenizer.add_special_tokens if one.special else tokenizer.add_tokens)([one])
            if tokenizer.token_to_id(token["content"]) != number:
                raise ModelError(f"Token {number} of tokenizer_config.json follows no token {number - 1}.", REMEDY)
    return tokenizer
