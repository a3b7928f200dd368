"""Named sources of calibration and evaluation samples: the demo set, a folder, a JSONL file, public captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qe_edge.calibration.captions import CAPTION_PROMPT, is_caption_source, load_captions
from qe_edge.errors import CalibrationError
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.images import open_image

DEMO = "demo"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_LINE = 1 << 20


def load_samples(source: str, count: int | None = None, seed: int = 0) -> list[Sample]:
    """Draw samples from a source.

    Args:
        source: "demo", a JSONL file, a folder with such files or with pictures (a `.txt` of the same name is a
            picture's caption), or public captions (see `qe_edge.calibration.captions`). A line has `image`,
            `question` and `answer`, of which `answer` and one of the others may be missing, or `text` alone: running
            text for a language model.
        count: How many to draw without replacement; None or more than there are takes all, in order.
        seed: Seed of the draw.

    Raises:
        CalibrationError: If the source is missing, empty or malformed.
    """
    if source == DEMO:
        from qe_edge.demo import calibration_path

        samples = read_jsonl(calibration_path())
    elif is_caption_source(source):
        return load_captions(source, count, seed)
    else:
        path = Path(source)
        if path.is_file():
            samples = read_jsonl(path)
        elif path.is_dir():
            samples = _read_folder(path)
        else:
            raise CalibrationError(
                f"There is no calibration source '{source}'.",
                "Give 'demo', a JSONL file, a folder of pictures, 'coco' or 'sharegpt4v:FOLDER'.",
            )
    if not samples:
        raise CalibrationError(f"'{source}' holds no sample.", "Add pictures with questions, or lines of text.")
    if count is not None and count < len(samples):
        chosen = np.random.default_rng(seed).choice(len(samples), count, replace=False)
        samples = [samples[index] for index in sorted(chosen)]
    return samples


def load_evaluation(source: str) -> list[Sample]:
    """Held-out samples with answers.

    Raises:
        CalibrationError: If the source is missing, empty, malformed, or has no answers.
    """
    if source == DEMO:
        from qe_edge.demo import evaluation_path

        return read_jsonl(evaluation_path())
    samples = load_samples(source)
    if any(sample.answer is None for sample in samples):
        raise CalibrationError(
            f"'{source}' has samples without an answer.", "Every evaluation line needs image, question and answer."
        )
    return samples


def read_jsonl(path: Path) -> list[Sample]:
    """Read samples from a JSONL file; picture paths are relative to the file and must stay below its folder.

    Raises:
        CalibrationError: Naming the first bad line.
    """
    samples = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line) if len(line) <= MAX_LINE else None
            except (ValueError, RecursionError):
                entry = None
            samples.append(_sample(entry, path, number))
    return samples


def hash_samples(samples: Sequence[Sample]) -> str:
    """SHA-256 over the decoded pictures, questions and answers."""
    digest = hashlib.sha256()
    for sample in samples:
        if sample.image is not None:
            picture = open_image(sample.image)
            digest.update(f"{picture.size}".encode() + picture.tobytes())
        # running text and a question of the same words become different tokens
        kind = [TEXT] if sample.kind == TEXT else []
        digest.update(json.dumps([sample.question, sample.answer, *kind]).encode())
    return digest.hexdigest()


def _sample(entry: Any, path: Path, number: int) -> Sample:  # noqa: ANN401 - anything a JSON line may hold
    where = f"Line {number} of '{path}'"
    entry = entry if isinstance(entry, dict) else {}
    if isinstance(entry.get("text"), str) and entry["text"].strip() and not {"image", "question"} & entry.keys():
        return Sample(None, entry["text"], kind=TEXT)
    image = entry.get("image")
    question = entry.get("question", CAPTION_PROMPT if image is not None else None)
    if not isinstance(question, str):
        raise CalibrationError(
            f"{where} is not a sample.",
            'Each line is JSON: {"image": ..., "question": ..., "answer": ...}, or {"text": ...} alone.',
        )
    if image is not None:
        folder = path.parent.resolve()
        target = (folder / str(image)).resolve()
        if not target.is_relative_to(folder):
            raise CalibrationError(f"{where} points outside its folder.", "Put the pictures beside the JSONL file.")
        if not target.is_file():
            raise CalibrationError(f"{where} names the missing picture '{image}'.", "Add the file or remove the line.")
        image = target
    answer = entry.get("answer")
    return Sample(
        image,
        question,
        None if answer is None else str(answer),
        str(entry.get("kind", "")),
        str(entry.get("topic", "")),
    )


def _read_folder(folder: Path) -> list[Sample]:
    files = sorted(folder.glob("*.jsonl"))
    if files:
        return [sample for file in files for sample in read_jsonl(file)]
    samples = []
    for picture in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        caption = picture.with_suffix(".txt")
        answer = caption.read_text(encoding="utf-8").strip() if caption.is_file() else None
        samples.append(Sample(picture, CAPTION_PROMPT, answer))
    return samples
