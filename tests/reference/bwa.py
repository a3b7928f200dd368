"""Free values by expectation and maximization, and second-order rounding to them, one weight at a time in float64."""

from __future__ import annotations

import numpy as np


def em_levels(row: np.ndarray, saliency: np.ndarray, bits: int, rounds: int) -> np.ndarray:
    """The better of two ends: from even steps over the range, and from even shares of the weights."""
    count, ends = 2**bits, []
    shares = [(number + 0.5) / count for number in range(count)]
    for start in (np.linspace(row.min(), row.max(), count), np.quantile(row, shares)):
        levels = start.copy()
        for _ in range(rounds):
            members: list[list[int]] = [[] for _ in levels]
            for place, value in enumerate(row):
                members[int(np.argmin(np.abs(levels - value)))].append(place)
            for number, places in enumerate(members):
                if places:
                    levels[number] = np.average(row[places], weights=saliency[places])
            levels.sort()
        stored = levels.astype(np.float16).astype(np.float64)
        ends.append((sum(s * np.abs(stored - v).min() ** 2 for v, s in zip(row, saliency, strict=True)), stored))
    return min(ends, key=lambda end: end[0])[1]


def bwa(weight: np.ndarray, hessian: np.ndarray, bits: int, group: int, rounds: int) -> np.ndarray:
    """The decoded weight `[out, in]`, by OBQ's update of the columns that are left."""
    w, result = weight.copy(), np.zeros_like(weight)
    inverse = np.linalg.inv(hessian)
    saliency = 1 / np.diag(np.linalg.cholesky(inverse)) ** 2
    for column in range(w.shape[1]):
        if column % group == 0:
            span = slice(column, column + group)
            levels = [em_levels(row[span], saliency[span], bits, rounds) for row in w]
        for row in range(len(w)):
            result[row, column] = levels[row][int(np.argmin(np.abs(levels[row] - w[row, column])))]
        left = np.arange(column, w.shape[1])
        current = np.linalg.inv(hessian[np.ix_(left, left)])
        error = (w[:, column] - result[:, column]) / current[0, 0]
        w[:, left] -= np.outer(error, current[0])
    return result
