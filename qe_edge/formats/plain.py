"""Tensors outside the quantized layers: as stored, but where channel scales or a rotation are folded into them.

A rotated model whose head shares the embedding `E` computes `E M norm(h)` with a matrix `M` after its last norm. No
other runtime has that place. The head becomes one of its own, `E M`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from qe_edge.formats.base import Conversion
from qe_edge.formats.carried import Piece

SECTION = "quantization_config"
ROWS = 1 << 13  # of the embedding that are multiplied at a time


def plain_pieces(conversion: Conversion) -> dict[str, Piece]:
    """Every tensor outside the quantized layers, by transformers' own name.

    Args:
        conversion: The checkpoint.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     print(sorted(plain_pieces(plan_conversion(source, FORMATS["gptq"]())))[:2])
    """
    source, mixing = conversion.source, conversion.folding.mixing
    found: dict[str, Piece] = {}
    for name, like in source.plain.items():
        factors = conversion.folding.norms.get(name)
        if mixing is None or name != mixing.matrix:
            new = mixing.norm_after if mixing is not None and name == mixing.norm else name
            found[new] = Piece(like if factors is None else like.float(), _stored(conversion, name, factors))
    if mixing is not None and mixing.head not in source.layers:
        embedding = source.tied[f"{mixing.head}.weight"]
        like = source.plain[embedding]
        found[f"{mixing.head}.weight"] = Piece(
            like, partial(_mixed, conversion, embedding, source.tensor(mixing.matrix))
        )
    return found


def config_of(conversion: Conversion) -> dict[str, Any]:
    """config.json without the section of quantization; head and embedding are two where a matrix was folded.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> from qe_edge.formats import FORMATS  # doctest: +SKIP
        >>> from qe_edge.formats.convert import plan_conversion  # doctest: +SKIP
        >>> from qe_edge.formats.source import open_checkpoint  # doctest: +SKIP
        >>> with open_checkpoint(Path("checkpoint")) as source:  # doctest: +SKIP
        ...     print(config_of(plan_conversion(source, FORMATS["gptq"]()))["model_type"])
    """
    config = {key: value for key, value in copy.deepcopy(conversion.source.config).items() if key != SECTION}
    if conversion.folding.mixing is not None:
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        for part in parts:
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    return config


def _stored(conversion: Conversion, name: str, factors: Tensor | None) -> Callable[[], Tensor]:
    def make() -> Tensor:
        tensor = conversion.source.tensor(name)
        return tensor if factors is None else tensor.float() * factors

    return make


def _mixed(conversion: Conversion, embedding: str, mixing: Tensor) -> Tensor:
    """The head `[vocabulary, hidden]`, in the embedding's type."""
    head, matrix = conversion.source.tensor(embedding), mixing.float()
    for start in range(0, len(head), ROWS):
        head[start : start + ROWS] = (head[start : start + ROWS].float() @ matrix).to(head.dtype)
    return head
