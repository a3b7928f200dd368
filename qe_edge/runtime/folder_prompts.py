"""Prompts from an exported folder's own files: tokenizer.json, `chat.json` and `preprocess.onnx`, no family's code.

It does in Python the same as the C++ library, so that tests can compare both with the families.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qe_edge.models.images import check_size
from qe_edge.models.picture_names import IMAGE, PICTURES, PLACEHOLDER_IDS, PLACEHOLDER_POSITIONS
from qe_edge.models.samples import Turn
from qe_edge.models.texts import shortened
from qe_edge.runtime.chat_segments import Piece, read_chat
from qe_edge.runtime.graph_specs import PictureEntry, PictureLabel
from qe_edge.runtime.manifest import Manifest
from qe_edge.runtime.sessions import OrtSession
from qe_edge.system.errors import ArtifactError, InputError

TOKENIZER = "tokenizer.json"
REMEDY = "Export or build the model again."
FIRST_PICTURE = 2  # number of the first picture's tokens in the mask; 0 is padding, 1 text
TOKENS = (PLACEHOLDER_IDS, PLACEHOLDER_POSITIONS)
PIXELS = "pixel_values"


@dataclass(frozen=True)
class Prompt:
    """One conversation, ready for the graphs.

    Attributes:
        ids: int64 `[1, tokens]`.
        positions: int64 `[axes, 1, tokens]`, or `[1, tokens]` where the language graph takes one axis.
        image_mask: `[1, tokens]` bool, True where a picture's feature stands.
        numbers: int64 `[1, tokens]`, the language graph's `attention_mask` on the prompt.
        feeds: Inputs of the visual encoder's runs, picture by picture.
    """

    ids: np.ndarray
    positions: np.ndarray
    image_mask: np.ndarray
    numbers: np.ndarray
    feeds: tuple[dict[str, np.ndarray], ...]


class FolderPrompts:
    """Reads conversations for the model of a folder.

    Args:
        folder: An ONNX or engine folder.
        manifest: Its manifest.

    Raises:
        ArtifactError: If `chat.json` or `preprocess.onnx` is missing or damaged.

    Example:
        `FolderPrompts(folder, read_manifest(folder)).read([Turn("user", "What is this?", (0,))], [pixels])`, with
        `pixels` uint8 `[height, width, 3]`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._manifest = manifest
        self._chat = read_chat(folder)
        self._picture = manifest.picture
        self._session = None if self._picture is None else OrtSession(folder, self._picture, 0, None, frugal=True)
        self._tokenizer = open_tokenizer(folder / TOKENIZER)
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._special_ids = {token.content: number for number, token in added if token.special and token.content}
        words = sorted(self._special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, words)) or "(?!)")

    def read(self, turns: Sequence[Turn], pictures: Sequence[np.ndarray]) -> Prompt:
        """A conversation up to where the assistant answers.

        Args:
            turns: The conversation.
            pictures: uint8 `[height, width, 3]`, RGB, in the order of their marks.

        Raises:
            InputError: If the folder has no graph for pictures, or they are too large or too narrow, or the template or
                the tokenizer cannot read the turns.
        """
        return self.filled(turns, [self.prepared(picture, len(pictures)) for picture in pictures])

    @property
    def counts_pictures(self) -> bool:
        """Whether a picture becomes something else beside other pictures."""
        return self._picture is not None and self._picture.counts_pictures

    def prepared(self, picture: np.ndarray, count: int = 1) -> dict[str, np.ndarray]:
        """Outputs of `preprocess.onnx` for one picture.

        Args:
            picture: uint8 `[height, width, 3]`.
            count: How many pictures the prompt has.

        Raises:
            InputError: If the folder has no graph for pictures, or this one is too large or too narrow.
        """
        if self._session is None or self._picture is None:
            raise InputError(
                "No graph prepares pictures for this model.", "Use Python with the model's own image processor."
            )
        _check_picture(picture, self._picture)
        feeds = {IMAGE: picture, **({PICTURES: np.array(count, np.int64)} if self.counts_pictures else {})}
        prepared = {name: np.asarray(value) for name, value in self._session.run(feeds).items()}
        if not len(prepared[TOKENS[0]]):
            height, width = picture.shape[:2]
            raise InputError(f"A picture of {width} x {height} is too narrow for the model.", "Crop the picture.")
        return prepared

    def filled(self, turns: Sequence[Turn], prepared: Sequence[Mapping[str, np.ndarray]]) -> Prompt:
        """As `read`, of pictures that are prepared."""
        ids = self._ids(self._chat.pieces(turns))
        placeholder = -1 if self._picture is None else self._picture.placeholder_id
        if ids.count(placeholder) != len(prepared) or sum(len(turn.marks) for turn in turns) != len(prepared):
            raise InputError(
                f"The conversation has places for {ids.count(placeholder)} pictures and {len(prepared)} are given.",
                "Give one picture for each mark.",
            )
        return self._filled(ids, prepared)

    def _filled(self, ids: list[int], prepared: Sequence[Mapping[str, np.ndarray]]) -> Prompt:
        """Tokens and positions with every placeholder replaced."""
        language = {spec.name: len(spec.shape) for spec in self._manifest.graphs["language"].inputs}
        axes = 1 if language["position_ids"] == 2 else 3
        waiting = iter(prepared)
        parts: list[np.ndarray] = []
        places: list[np.ndarray] = []
        numbers: list[np.ndarray] = []
        start, picture = 0 if self._picture is None else self._picture.first_position, 0
        for number in ids:
            tokens, relative = np.array([number]), np.zeros((axes, 1), np.int64)
            mask = np.ones(1, np.int64)
            if self._picture is not None and number == self._picture.placeholder_id:
                tokens, relative = _labelled(next(waiting), self._picture.label, picture)
                mask = np.where(tokens == self._manifest.image_token_id, FIRST_PICTURE + picture, 1)
                picture += 1
            parts.append(tokens)
            places.append(relative + start)
            numbers.append(mask)
            start += int(relative.max()) + 1
        joined, positions = np.concatenate(parts)[None], np.concatenate(places, axis=1)
        mask = np.concatenate(numbers)[None]
        return Prompt(
            ids=joined.astype(np.int64),
            positions=positions if axes == 1 else positions[:, None],
            image_mask=mask >= FIRST_PICTURE,
            numbers=self._numbers(mask),
            feeds=tuple(run for one in prepared for run in visual_runs(one)),
        )

    def _numbers(self, mask: np.ndarray) -> np.ndarray:
        """The language graph's `attention_mask`, of one that numbers the features of pictures."""
        entry = self._picture
        if entry is not None and entry.max_prompt is not None and mask.shape[1] > entry.max_prompt:
            raise InputError(
                f"A prompt has {mask.shape[1]} tokens; exported graphs of this model take {entry.max_prompt}.",
                "Shorten the question, or use a model for smaller pictures.",
            )
        if entry is not None and entry.numbered:
            return mask
        return np.full_like(mask, FIRST_PICTURE if entry is not None and entry.whole else 1)

    def _ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of a prompt; special tokens that a user's text spells are text, as `qe_edge.models.chat` reads them."""
        spelled = [found for piece in pieces if not piece.trusted for found in self._special.findall(piece.text)]
        whole = "".join(piece.text for piece in pieces)
        if not spelled:
            return self._encoded(whole, special=True)
        words = {text: f"x{secrets.token_hex(16)}x" for text in spelled}
        hidden = [
            piece if piece.trusted else replace(piece, text=self._special.sub(lambda m: words[m.group()], piece.text))
            for piece in pieces
        ]
        as_whole = self._encoded("".join(piece.text for piece in hidden), special=True)
        ids = self._in_parts(pieces)
        if self._in_parts(hidden) != as_whole or self._count(ids) != self._count(as_whole):
            raise InputError(
                f"A text spells the special token '{spelled[0]}', which this tokenizer cannot read as text.",
                "Leave it out, or put a space into it.",
            )
        return ids

    def _in_parts(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of what stands between the template's special tokens, and of these."""
        ids: list[int] = []
        text = ""
        for piece in pieces:
            parts = re.split(f"({self._special.pattern})", piece.text) if piece.trusted else [piece.text]
            for number, part in enumerate(parts):
                if number % 2 == 0:
                    text += part
                    continue
                ids += [*self._encoded(text, special=False), self._special_ids[part]]
                text = ""
        return ids + self._encoded(text, special=False)

    def _encoded(self, text: str, *, special: bool) -> list[int]:
        if not text:
            return []
        self._tokenizer.encode_special_tokens = not special
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _count(self, ids: Sequence[int]) -> int:
        return sum(number in self._special_ids.values() for number in ids)


def open_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
        ArtifactError: If the file is missing or damaged.

    Example:
        >>> from qe_edge.demo import model_path
        >>> len(open_tokenizer(model_path() / TOKENIZER).encode("red circle").ids) > 0
        True
    """
    if not file.is_file():
        raise ArtifactError(f"'{file.parent}' has no {file.name}.", REMEDY)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        reason = shortened(" ".join(str(error).split()))
        raise ArtifactError(f"'{file}' is damaged: {reason}.", REMEDY) from error


def visual_runs(prepared: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Inputs of the visual encoder's runs for a picture, of the outputs of `preprocess.onnx`.

    Example:
        >>> outputs = {"pixel_values": np.zeros((0, 4, 3)), "pixel_values.2": np.zeros((1, 6, 3))}
        >>> [run["pixel_values"].shape for run in visual_runs(outputs)]  # the first one has nothing to see
        [(1, 6, 3)]
    """
    runs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in prepared.items():
        own, _, number = name.partition(".")
        if name not in TOKENS:
            runs.setdefault(number, {})[own] = array
    return [run for run in runs.values() if len(run[PIXELS])]


def _labelled(
    prepared: Mapping[str, np.ndarray], label: PictureLabel | None, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a picture with those that say its number, and their positions from the first one on."""
    tokens, relative = (np.asarray(prepared[name]) for name in TOKENS)
    if label is None:
        return tokens, relative
    said = np.array(label.ids(number))
    counted = np.broadcast_to(np.arange(len(said)), (len(relative), len(said)))
    return np.concatenate([said, tokens]), np.concatenate([counted, relative + len(said)], axis=1)


def _check_picture(picture: np.ndarray, entry: PictureEntry) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise InputError(
            f"A picture is an array of {picture.dtype} {list(picture.shape)}.", "Give uint8 [height, width, 3]."
        )
    height, width = picture.shape[:2]
    check_size((width, height), "A picture")
    longest, shortest = max(height, width), min(height, width)
    if longest > entry.max_side or height * width > entry.max_pixels:
        raise InputError(
            f"A picture of {width} x {height} is too large: up to {entry.max_side} pixels a side and "
            f"{entry.max_pixels} in all are read.",
            "Scale it down first.",
        )
    if entry.max_aspect is not None and longest > entry.max_aspect * shortest:
        raise InputError(
            f"A picture of {width} x {height} is too narrow: one side is more than {entry.max_aspect} times the other.",
            "Crop the picture.",
        )
