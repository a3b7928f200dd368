"""The token embedding table on disk: rows are gathered from the mapped file, never loaded as a whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qe_edge.checkpoint.dtypes import KINDS
from qe_edge.checkpoint.safetensors_check import check_safetensors, tensor_offset
from qe_edge.system.errors import ArtifactError

EMBEDDING = "embedding.safetensors"
TENSOR = "embedding"
SCALES = "scales"  # of every row, where the table is INT8 codes
STORAGE = ("F32", "F16", "BF16", "I8")


class TokenEmbedding:
    """Rows of the embedding table as float32.

    Args:
        folder: Folder that holds `embedding.safetensors`.
        rows: Expected number of tokens; the table may have more (padding).
        width: Expected width.
        widest: Width of a table that holds further embeddings of every token behind the first one; None for none.

    Raises:
        ArtifactError: If the file is missing, damaged or of another size.

    Example:
        >>> from safetensors.numpy import save_file
        >>> save_file({TENSOR: np.arange(6, dtype=np.float16).reshape(3, 2)}, EMBEDDING)
        >>> embedding = TokenEmbedding(Path(), rows=3, width=2)
        >>> embedding(np.array([[2, 0]]))
        array([[[4., 5.],
                [0., 1.]]], dtype=float32)
    """

    def __init__(self, folder: Path, rows: int, width: int, widest: int | None = None) -> None:
        path = folder / EMBEDDING
        if not path.is_file():
            raise ArtifactError(f"'{folder}' is damaged: '{EMBEDDING}' is missing.", "Export the model again.")
        header = check_safetensors(path)
        dtype, shape = header.get(TENSOR, ("none", ()))
        wanted = {TENSOR: (dtype, shape)} | ({SCALES: ("F32", shape[:1])} if dtype == "I8" else {})
        fits = len(shape) == 2 and shape[0] >= rows and shape[1] in (width, max(width, widest or 0))
        if header != wanted or dtype not in STORAGE or not fits:
            raise ArtifactError(
                f"'{path}' is {dtype}{list(shape)} and should have {rows} rows of {width}.", "Export the model again."
            )
        self._table = _mapped(path, TENSOR, dtype, shape)
        self._scales = _mapped(path, SCALES, "F32", shape[:1]) if dtype == "I8" else None

    def __call__(self, token_ids: np.ndarray) -> np.ndarray:
        """Embeddings float32 `[..., width]` of int64 `token_ids` `[...]`."""
        rows = np.asarray(self._table[token_ids])
        if rows.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        found = rows.astype(np.float32, copy=False)
        return found if self._scales is None else found * np.asarray(self._scales[token_ids])[..., None]


def _mapped(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(path, KINDS[dtype].numpy, mode="r", offset=tensor_offset(path, name), shape=shape)
