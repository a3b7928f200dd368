"""Runs of image and video tokens in the prompts of the Qwen-VL families, and M-RoPE's positions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qe_edge.models.family import Encoded

TEXT, IMAGE, VIDEO = 0, 1, 2  # transformers' numbers of modalities
Shape = tuple[tuple[int, int, int], float]  # a grid, and the seconds of its step of time


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are text, or stand for one picture or video, or for one step of time of a video.

    Attributes:
        kind: `TEXT`, `IMAGE` or `VIDEO`.
        length: Number of tokens.
        grid: Steps of time, rows and columns of patches; zeros for text.
        seconds: Of a step of time, a number that float32 holds.
    """

    kind: int
    length: int
    grid: tuple[int, int, int] = (0, 0, 0)
    seconds: float = 0.0


class TokenRuns:
    """Finds the runs of a batch.

    Args:
        merge: Patches a side that become one token.
        video_token: The token of a video's feature; None where the model has none.
        apart: Whether each step of time of a video has a run of its own.

    Example:
        >>> ids = np.array([[5, 9, 9, 6]])
        >>> pixels = {"image_grid_thw": np.array([[1, 2, 4]])}
        >>> encoded = Encoded(ids, np.ones_like(ids), ids == 9, ids < 0, pixels)
        >>> runs = TokenRuns(merge=2, video_token=None, apart=False)
        >>> [(run.kind, run.length) for run in runs.of(encoded)[0]]
        [(0, 1), (1, 2), (0, 1)]
        >>> runs.positions(encoded)[2].tolist()  # of columns
        [[0, 1, 2, 3]]
    """

    def __init__(self, merge: int, video_token: int | None, *, apart: bool) -> None:
        self._merge, self._video_token, self._apart = merge, video_token, apart

    def kinds(self, encoded: Encoded) -> np.ndarray:
        """Modality of every token, int64 `[batch, sequence]`: transformers' `mm_token_type_ids`."""
        kinds: np.ndarray = encoded.image_mask.astype(np.int64)
        if self._video_token is not None:
            kinds[encoded.image_mask & (encoded.input_ids == self._video_token)] = VIDEO
        return kinds

    def of(self, encoded: Encoded) -> list[list[Run]]:
        """The runs of every row, without padding."""
        pictures = encoded.pixels.get("image_grid_thw", np.zeros((0, 3), np.int64)).tolist()
        grids: dict[int, Iterator[Shape]] = {
            IMAGE: (((steps, height, width), 0.0) for steps, height, width in pictures),
            VIDEO: self._videos(encoded),
        }
        rows: list[list[Run]] = []
        for kinds, mask in zip(self.kinds(encoded), encoded.attention_mask.astype(bool), strict=True):
            runs: list[Run] = []
            for kind, group in itertools.groupby(kinds[mask].tolist()):
                length = len(list(group))
                while length and kind != TEXT:
                    grid, seconds = next(grids[kind])
                    tokens = grid[0] * grid[1] * grid[2] // self._merge**2
                    runs.append(Run(kind, tokens, grid, seconds))
                    length -= tokens
                runs += [Run(TEXT, length)] if length else []
            rows.append(runs)
        return rows

    def positions(self, encoded: Encoded, per_second: float | None = None) -> np.ndarray:
        """Positions int64 `[3, batch, sequence]`: text counts on, a picture or video spans its grid of merged patches.

        Args:
            encoded: The batch.
            per_second: Positions of a second of a video; None where every step of time is one position.
        """
        positions = np.zeros((3, *encoded.input_ids.shape), np.int64)
        for row, runs in enumerate(self.of(encoded)):
            parts: list[np.ndarray] = []
            current = 0
            for run in runs:
                if run.kind == TEXT:
                    parts.append(np.tile(np.arange(current, current + run.length), (3, 1)))
                    current += run.length
                    continue
                steps, height, width = run.grid
                places = np.indices((steps, height // self._merge, width // self._merge)).reshape(3, -1)
                if run.kind == VIDEO and per_second is not None:  # in float32, as transformers
                    interval = np.float32(per_second) * np.float32(run.seconds)
                    places[0] = (places[0].astype(np.float32) * interval).astype(np.int64)
                parts.append(places + current)
                current += max(height, width) // self._merge
            positions[:, row, encoded.attention_mask[row].astype(bool)] = np.concatenate(parts, axis=1)
        return positions

    def _videos(self, encoded: Encoded) -> Iterator[Shape]:
        grids = encoded.pixels.get("video_grid_thw", np.zeros((0, 3), np.int64)).tolist()
        seconds = encoded.pixels.get("second_per_grid_ts", np.zeros(len(grids), np.float32)).tolist()
        for (steps, height, width), each in zip(grids, seconds, strict=True):
            for _ in range(steps if self._apart else 1):
                yield (1 if self._apart else steps, height, width), each
