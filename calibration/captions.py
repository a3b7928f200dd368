"""Public pictures with captions: ShareGPT4V on COCO, as in the paper, and COCO with its own captions.

The package `datasets` reads both. `sharegpt4v:FOLDER` and `coco:FOLDER` take FOLDER for a copy in the hub's layout:

- sharegpt4v: `coco/train2017/000000000009.jpg`, ... and `sharegpt4v_instruct_gpt4-vision_cap100k.json`, or only the
  pictures: captions then come from the hub. Pictures are not in that data set: COCO's `train2017.zip` holds them.
- coco: the Parquet files of lmms-lab/COCO-Caption2017 (`data/val-*.parquet`), pictures included.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qe_edge.models.family import Sample
from qe_edge.system.errors import CalibrationError, InputError

CAPTION_PROMPT = "Describe the picture."
SOURCES = ("sharegpt4v", "coco")
SHAREGPT4V, SHAREGPT4V_FILE = "Lin-Chen/ShareGPT4V", "sharegpt4v_instruct_gpt4-vision_cap100k.json"
COCO, COCO_SPLIT = "lmms-lab/COCO-Caption2017", "val"
COCO_PICTURES = "coco/"  # ShareGPT4V's captions of other pictures are left out
IMAGE_MARK = "<image>"


def is_caption_source(source: str) -> bool:
    """Whether `source` is "sharegpt4v", "coco", or one of them with a folder behind a colon.

    Example:
        >>> is_caption_source("coco"), is_caption_source("sharegpt4v:data/coco"), is_caption_source("my-photos")
        (True, True, False)
    """
    return source.partition(":")[0] in SOURCES


def load_captions(source: str, count: int | None, seed: int) -> list[Sample]:
    """Draw pictures with captions.

    Args:
        source: "sharegpt4v:FOLDER", "coco" or "coco:FOLDER".
        count: How many to draw without replacement; None or more than there are takes all, in order.
        seed: Seed of the draw.

    Raises:
        CalibrationError: If `datasets` is missing, the hub does not answer, or data or pictures are missing.

    Example:
        >>> load_captions("coco:no-such-folder", count=64, seed=0)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.CalibrationError: There is no folder 'no-such-folder' for 'coco'. Check the path
        behind the colon.
    """
    name, _, place = source.partition(":")
    folder = Path(place) if place else None
    if folder is not None and not folder.is_dir():
        raise CalibrationError(f"There is no folder '{folder}' for '{name}'.", "Check the path behind the colon.")
    return _sharegpt4v(folder, count, seed) if name == "sharegpt4v" else _coco(folder, count, seed)


def _sharegpt4v(folder: Path | None, count: int | None, seed: int) -> list[Sample]:
    if folder is None:
        raise CalibrationError(
            "'sharegpt4v' has captions, and its pictures lie elsewhere.",
            "Unpack COCO's train2017.zip to FOLDER/coco/train2017 and give 'sharegpt4v:FOLDER'.",
        )
    captions = folder / SHAREGPT4V_FILE
    rows = _load("json", data_files=str(captions)) if captions.is_file() else _load(SHAREGPT4V, "ShareGPT4V")
    _check_columns(rows, ("image", "conversations"), "sharegpt4v")
    usable = [index for index, image in enumerate(rows["image"]) if str(image).startswith(COCO_PICTURES)]
    samples = []
    for index in _draw(usable, count, seed, "sharegpt4v"):
        row = rows[index]
        picture = (folder / row["image"]).resolve()
        if not picture.is_relative_to(folder.resolve()) or not picture.is_file():
            raise CalibrationError(
                f"There is no picture '{row['image']}' in '{folder}'.", "Unpack COCO's train2017.zip there."
            )
        try:
            turns = {turn["from"]: turn["value"] for turn in reversed(row["conversations"])}  # the first of each side
            question = turns.get("human", "").replace(IMAGE_MARK, "").strip()
            sample = Sample(picture, question or CAPTION_PROMPT, turns.get("gpt"), origin=f"'{row['image']}'")
        except (KeyError, TypeError, AttributeError, InputError) as error:
            raise CalibrationError(
                f"The conversation about '{row['image']}' cannot be read: {error}", "Download the data again."
            ) from error
        samples.append(sample)
    return samples


def _coco(folder: Path | None, count: int | None, seed: int) -> list[Sample]:
    if folder is None:
        rows = _load(COCO, split=COCO_SPLIT)
    else:
        files = sorted(str(path) for path in folder.rglob(f"{COCO_SPLIT}-*.parquet"))
        if not files:
            raise CalibrationError(f"'{folder}' holds no {COCO_SPLIT}-*.parquet.", f"Copy the data set {COCO} there.")
        rows = _load("parquet", data_files=files)
    _check_columns(rows, ("image", "answer"), "coco")
    chosen = _draw(range(len(rows)), count, seed, "coco")
    rows = rows.cast_column("image", _datasets().Image(decode=False))  # it would open more formats than we do
    return [_coco_sample(rows[index], f"Picture {index} of 'coco'") for index in chosen]


def _coco_sample(row: dict[str, Any], origin: str) -> Sample:
    captions = row["answer"]  # usually five of each picture
    captions = [captions] if isinstance(captions, str) else captions
    data = row["image"]["bytes"] if isinstance(row["image"], dict) else None
    if data is None:
        raise CalibrationError(f"{origin} is not in its Parquet file.", "Download the data again.")
    return Sample(data, CAPTION_PROMPT, str(captions[0]) if captions else None, origin=origin)


def _draw(usable: Iterable[int], count: int | None, seed: int, name: str) -> list[int]:
    indices = list(usable)
    if not indices:
        raise CalibrationError(f"'{name}' holds no picture of COCO with a caption.", "Download the data again.")
    if count is None or count >= len(indices):
        return indices
    drawn = np.random.default_rng(seed).choice(len(indices), count, replace=False)
    return [indices[position] for position in sorted(drawn)]


def _check_columns(rows: Any, wanted: Iterable[str], name: str) -> None:  # noqa: ANN401 - datasets has no types
    missing = [column for column in wanted if column not in rows.column_names]
    if missing:
        raise CalibrationError(f"The data of '{name}' have no column '{missing[0]}'.", "Download the data again.")


def _datasets() -> Any:  # noqa: ANN401 - datasets has no types
    try:
        return import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            "Captions are read by the package 'datasets', which is not installed.", 'Run: pip install "datasets>=3.0"'
        ) from error


def _load(path: str, name: str | None = None, *, split: str = "train", **options: Any) -> Any:  # noqa: ANN401
    datasets = _datasets()
    if "data_files" not in options and Path(path).exists():  # `datasets` would read that instead
        raise CalibrationError(
            f"A folder '{path}' lies in the current folder and hides the public data set of that name.",
            "Run the command in another folder, or give the copy's: 'coco:FOLDER', 'sharegpt4v:FOLDER'.",
        )
    try:
        return datasets.load_dataset(path, name, split=split, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalibrationError(
            f"The data set '{path}' cannot be loaded: {reason.rstrip('.')}.",
            "Check the network, or copy the data set and give its folder: 'coco:FOLDER', 'sharegpt4v:FOLDER'.",
        ) from error
