"""The model of a folder where transformers is not installed: the folder's own files in place of a family's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qe_edge.models.family import Encoded, Sample, following_positions
from qe_edge.models.images import open_image
from qe_edge.models.processors import VisionLanguageProcessor
from qe_edge.models.samples import TEXT
from qe_edge.runtime.folder_prompts import PIXELS, TOKENIZER, TOKENS, FolderPrompts, Prompt, open_tokenizer
from qe_edge.runtime.manifest import Manifest
from qe_edge.system.errors import InputError

REMEDY = "Run: pip install 'qe-edge[quantize]'."


@dataclass(frozen=True)
class FolderEncoded(Encoded):
    """An `Encoded` that knows what else the graphs take.

    Attributes:
        positions: int64 `[axes, batch, sequence]`, or `[batch, sequence]`.
        numbers: The language graph's `attention_mask` for the prompt, int64 `[batch, sequence]`.
        feeds: Inputs of the visual encoder's runs, picture by picture.
    """

    positions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    numbers: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    feeds: tuple[dict[str, np.ndarray], ...] = ()


class FolderTokenizer:
    """The part of a tokenizer that answers need.

    Args:
        file: A tokenizer.json.

    Raises:
        ArtifactError: If it is missing or damaged.

    Example:
        >>> from qe_edge.demo import model_path
        >>> tokenizer = FolderTokenizer(model_path() / "tokenizer.json")
        >>> ids = open_tokenizer(model_path() / "tokenizer.json").encode("red circle").ids
        >>> tokenizer.decode(ids, skip_special_tokens=True)
        'red circle'
    """

    def __init__(self, file: Path) -> None:
        self._tokenizer = open_tokenizer(file)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Text of tokens."""
        text: str = self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)
        return text

    def __deepcopy__(self, memo: dict[int, object]) -> FolderTokenizer:
        """Decoding changes nothing, so one serves all."""
        return self


class FolderModel:
    """Does for an engine what a model family does, from tokenizer.json, `chat.json` and `preprocess.onnx`.

    Args:
        folder: An ONNX or engine folder.
        manifest: Its manifest.

    Raises:
        ArtifactError: If one of these files is missing or damaged.

    Example:
        `FolderModel(folder, read_manifest(folder)).encode(processor, [Sample("a.png", "what is it?")])`
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._prompts = FolderPrompts(folder, manifest)
        self.pictures_stand_alone = not self._prompts.counts_pictures
        self._pad = manifest.pad_token_id
        self.processor = VisionLanguageProcessor(FolderTokenizer(folder / TOKENIZER), self._prepare)

    def encode(
        self, processor: VisionLanguageProcessor, samples: Sequence[Sample], *, answers: bool = False
    ) -> Encoded:
        """Tokenize prompts and prepare pictures as one left-padded batch.

        Raises:
            InputError: If a picture or a conversation cannot be read, or a sample is running text.
        """
        if answers or any(sample.kind == TEXT for sample in samples):
            raise InputError("Without transformers, an engine only answers questions.", REMEDY)
        prompts = [self._read(processor, sample) for sample in samples]
        longest = max(prompt.ids.shape[1] for prompt in prompts)

        def rows(name: str, fill: int) -> np.ndarray:
            parts = [getattr(prompt, name) for prompt in prompts]
            padding = [[(0, 0)] * (part.ndim - 1) + [(longest - part.shape[-1], 0)] for part in parts]
            padded = [np.pad(part, pad, constant_values=fill) for part, pad in zip(parts, padding, strict=True)]
            return np.concatenate(padded, axis=-2)

        masks = [np.arange(longest)[None] >= longest - prompt.ids.shape[1] for prompt in prompts]
        feeds = tuple(feed for prompt in prompts for feed in prompt.feeds)
        return FolderEncoded(
            input_ids=rows("ids", self._pad),
            attention_mask=np.concatenate(masks).astype(np.int64),
            image_mask=rows("image_mask", 0),
            answer_mask=np.zeros((len(prompts), longest), bool),
            pixels=_pixels(feeds),
            positions=rows("positions", 0),
            numbers=rows("numbers", 0),
            feeds=feeds,
        )

    def visual_feeds(self, encoded: Encoded) -> list[dict[str, np.ndarray]]:
        """Inputs of every run of the visual encoder."""
        return list(_own(encoded).feeds)

    def position_ids(self, encoded: Encoded) -> np.ndarray:
        """Positions of the prompt tokens."""
        return _own(encoded).positions

    def graph_mask(self, encoded: Encoded) -> np.ndarray:
        """`attention_mask` of the language graph for a prompt."""
        return _own(encoded).numbers

    def next_position_ids(self, positions: np.ndarray, step: int) -> np.ndarray:
        """Positions of generated token number `step`."""
        return following_positions(positions, step)

    def _read(self, processor: VisionLanguageProcessor, sample: Sample) -> Prompt:
        if sample.videos:
            raise InputError("Without transformers, an engine reads no videos.", REMEDY)
        opened = [open_image(picture) for picture in sample.pictures]
        beside = {} if self.pictures_stand_alone else {"count": len(opened)}
        prepared = [processor.image_processor(images=[one], **beside) for one in opened]
        return self._prompts.filled(sample.conversation, prepared)

    def _prepare(self, *, images: list[Image.Image], count: int = 1) -> dict[str, Any]:
        """As transformers' image processors are called; tokens come as lists, which are kept when pixels are not."""
        (picture,) = images
        prepared = self._prompts.prepared(np.asarray(picture), count)
        return {name: array.tolist() if name in TOKENS else array for name, array in prepared.items()}


def _pixels(feeds: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What the check of engine limits counts: tiles, and groups and patches of each picture as rows and columns."""
    shapes = [feed[PIXELS].shape for feed in feeds]
    if not shapes:
        return {}
    grids = [(1, *shape[:2]) for shape in shapes]
    return {"image_grid_thw": np.array(grids, np.int64), "grids": np.zeros((sum(shape[0] for shape in shapes), 2))}


def _own(encoded: Encoded) -> FolderEncoded:
    if not isinstance(encoded, FolderEncoded):
        raise TypeError("this batch was encoded by a model family")
    return encoded
