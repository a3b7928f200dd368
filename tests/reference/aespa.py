"""aespa literally, in float64: every pair of tokens, every rotation as a matrix, and one Hessian for a whole head."""

from __future__ import annotations

import numpy as np

from tests.reference.gptq import gptq


def rotation(cosine: np.ndarray, sine: np.ndarray) -> np.ndarray:
    """The matrix `[width, width]` that turns a head at one position, from its cosines and sines `[width]`."""
    width = len(cosine)
    half = np.zeros((width, width))
    for number in range(width // 2):
        half[number, number + width // 2] = -1
        half[number + width // 2, number] = 1
    matrix: np.ndarray = np.diag(cosine) + np.diag(sine) @ half
    return matrix


def met_gram(own: list[np.ndarray], others: np.ndarray) -> np.ndarray:
    """`sum_t sum_s (R_t^T o_s) (R_t^T o_s)^T` `[width, width]`.

    Args:
        own: The rotation of every token whose error counts.
        others: `[tokens, width]` what they meet, rotated.
    """
    total = np.zeros((others.shape[1], others.shape[1]))
    for turn in own:
        for other in others:
            total += np.outer(turn.T @ other, turn.T @ other)
    return total


def attention(query: np.ndarray, key: np.ndarray, scaling: float, counted: np.ndarray, *, causal: bool) -> np.ndarray:
    """Weights `[tokens, tokens]` of one head; tokens that do not count see nothing and are not seen."""
    tokens = len(query)
    weights = np.zeros((tokens, tokens))
    for t in np.flatnonzero(counted):
        seen = [s for s in np.flatnonzero(counted) if s <= t or not causal]
        scores = np.array([scaling * query[t] @ key[s] for s in seen])
        likely = np.exp(scores - scores.max())
        weights[t, seen] = likely / likely.sum()
    return weights


def round_head(weight: np.ndarray, gram: np.ndarray, outputs: np.ndarray, bits: int, damping: float) -> np.ndarray:
    """Decoded weight `[width, in]` of one head: GPTQ on all its weights in a row, with the Hessian `B x H`.

    One symmetric scale per output channel.
    """
    rows, columns = (matrix + damping * np.diag(matrix).mean() * np.eye(len(matrix)) for matrix in (outputs, gram))
    flat = gptq(weight.reshape(1, -1), np.kron(rows, columns), bits, weight.shape[1], 0.0, symmetric=True)
    return flat.reshape(weight.shape)
