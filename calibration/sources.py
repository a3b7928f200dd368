"""Named sources of calibration and evaluation samples: the demo set, a folder, a JSONL file, public captions."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from qe_edge.calibration.captions import is_caption_source, load_captions
from qe_edge.calibration.folders import read_folder
from qe_edge.calibration.lines import read_line
from qe_edge.demo import calibration_path, evaluation_path
from qe_edge.models.batching import naming
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.images import is_file, open_image
from qe_edge.models.texts import is_unicode, shortened
from qe_edge.models.videos import Video, content_of
from qe_edge.system.errors import CalibrationError, CommonNotice

DEMO = "demo"
SEEING = ("visual", "merger")  # parts of a model that read nothing but pictures
MAX_LINE = 1 << 20  # characters


def load_samples(source: str, count: int | None = None, seed: int = 0, *, asked: bool = True) -> list[Sample]:
    """Draw samples from a source.

    Args:
        source: "demo", a JSONL file (see `qe_edge.calibration.lines`), a folder with such files or with pictures (see
            `qe_edge.calibration.folders`), or public captions (see `qe_edge.calibration.captions`).
        count: How many to draw without replacement; None or more than there are takes all, in order.
        seed: Seed of the draw.
        asked: Whether a user asked for this number; a notice says if there are fewer.

    Raises:
        CalibrationError: If the source is missing, empty or malformed.

    Example:
        >>> samples = load_samples("demo", count=2, seed=0)
        >>> [(sample.question, sample.answer) for sample in samples]
        [('does the image contain a triangle?', 'no'), ('what is the black shape?', 'circle')]
    """
    if source == DEMO:
        samples = read_jsonl(calibration_path())
    elif is_caption_source(source):
        samples = load_captions(source, count, seed)
    else:
        samples = _read_path(source)
    if not samples:
        raise CalibrationError(f"'{source}' holds no sample.", "Add pictures with questions, or lines of text.")
    if count is not None and count < len(samples):
        chosen = np.random.default_rng(seed).choice(len(samples), count, replace=False)
        samples = [samples[index] for index in sorted(chosen)]
    if asked and count is not None and count > len(samples):
        warnings.warn(
            f"{count} calibration samples were asked for; '{shortened(source)}' holds {len(samples)}, and all are "
            "taken.",
            CommonNotice,
            stacklevel=2,
        )
    return samples


def load_evaluation(source: str) -> list[Sample]:
    """Held-out samples with answers, or with the states of a robot.

    Raises:
        CalibrationError: If the source is missing, empty, malformed, or has no answers.

    Example:
        >>> samples = load_evaluation("demo")
        >>> len(samples), all(sample.answer for sample in samples)
        (200, True)
    """
    if source == DEMO:
        return read_jsonl(evaluation_path())
    samples = load_samples(source)
    if any(sample.answer is None and sample.state is None for sample in samples):
        raise CalibrationError(
            f"'{source}' has samples without an answer.", "Every evaluation line needs image, question and answer."
        )
    return samples


def read_jsonl(path: Path) -> list[Sample]:
    r"""Read samples from a JSONL file; picture paths are relative to the file and must stay below its folder.

    Raises:
        CalibrationError: Naming the first bad line.

    Example:
        >>> _ = Path("data.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
        >>> [sample.question for sample in read_jsonl(Path("data.jsonl"))]
        ['One.', 'Two.']
    """
    return [read_line(line, path, number) for number, line in _lines(path) if line.strip()]


def check_reached(samples: Sequence[Sample], modules: Sequence[str]) -> None:
    """Refuse calibration samples of which none reaches a selected part of the model.

    Args:
        samples: The samples.
        modules: Selected parts: "visual", "merger", "language".

    Raises:
        CalibrationError: If none has a picture, and a part is selected that sees nothing else.

    Example:
        >>> text = [Sample(None, "A line of running text.", kind=TEXT)]
        >>> check_reached(text, ["language"])
        >>> check_reached(text, ["visual", "language"])
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.CalibrationError: No calibration sample has a picture, so no data reaches 'visual'.
        Use samples with pictures, or quantize the language model alone ('--modules language').
    """
    blind = [name for name in modules if name in SEEING]
    if blind and not any(sample.media for sample in samples):
        raise CalibrationError(
            f"No calibration sample has a picture, so no data reaches '{blind[0]}'.",
            "Use samples with pictures, or quantize the language model alone ('--modules language').",
        )


def check_robot(samples: Sequence[Sample], source: str, *, acts: bool) -> None:
    """Refuse the demo's questions as calibration data of a model that makes actions; they are the default.

    Raises:
        CalibrationError: If they are that.

    Example:
        >>> check_robot(load_samples("demo", 1), "demo", acts=False)
        >>> check_robot(load_samples("demo", 1), "demo", acts=True)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.CalibrationError: The model makes actions of a robot, and the demo's questions, which
        calibrate by default, have none. Give recordings of your robot ('--calibration FILE').
    """
    if acts and source == DEMO and not any(sample.state for sample in samples):
        raise CalibrationError(
            "The model makes actions of a robot, and the demo's questions, which calibrate by default, have none.",
            "Give recordings of your robot ('--calibration FILE').",
        )


def samples_from_python(values: object) -> list[Sample]:
    """Samples that were passed from Python, as a list.

    Raises:
        CalibrationError: If a value is no sample; the message names its type.

    Example:
        >>> samples_from_python(["cat.png"])
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.CalibrationError: A str was passed as a calibration sample. Pass a list of
        Sample(picture, question, answer), or the name of a source.
    """
    given = [values] if isinstance(values, Mapping) or not isinstance(values, Iterable) else values
    samples: list[Sample] = []
    for value in given:
        if not isinstance(value, Sample):
            raise CalibrationError(
                f"A {type(value).__name__} was passed as a calibration sample.",
                "Pass a list of Sample(picture, question, answer), or the name of a source.",
            )
        samples.append(value)
    return samples


def hash_samples(samples: Sequence[Sample]) -> str:
    """SHA-256 over the decoded pictures, questions and answers.

    Raises:
        InputError: Naming the sample, if a picture cannot be read.

    Example:
        >>> one, other = Sample(None, "Is it red?", "yes"), Sample(None, "Is it red?", "no")
        >>> hash_samples([one])[:8], hash_samples([one]) == hash_samples([other])
        ('563f15fc', False)
    """
    digest = hashlib.sha256()
    for sample in samples:
        for shown in sample.media:
            with naming(sample):
                if isinstance(shown, Video):
                    digest.update(f"video {shown.fps} {shown.every_frame}".encode())
                    for part in content_of(shown):
                        digest.update(part)
                    continue
                picture = open_image(shown)
            digest.update(f"{picture.size}".encode())
            digest.update(picture.tobytes())
        # running text and a question of the same words become different tokens
        kind = [TEXT] if sample.kind == TEXT else []
        robot = [] if sample.state is None else [{"state": sample.state, "actions": sample.actions}]
        digest.update(json.dumps([sample.question, sample.answer, *kind, *_further(sample), *robot]).encode())
    return digest.hexdigest()


def _further(sample: Sample) -> list[object]:
    """Properties that few samples have: several answers, earlier turns, pictures elsewhere than before the question."""
    turns = sample.conversation
    if not sample.answers and len(turns) == 1 and not any(turns[0].marks):
        return []
    told = [{name: value for name, value in asdict(turn).items() if name != "videos" or value} for turn in turns]
    return [{"answers": sample.answers, "turns": told}]


def _read_path(source: str) -> list[Sample]:
    path = Path(source)
    if not is_unicode(source):  # a recipe that names it could not be written
        raise CalibrationError("The calibration source's name is not UTF-8.", "Rename the file or folder.")
    if is_file(path):
        return read_jsonl(path)
    try:
        folder = path.is_dir()
    except (OSError, ValueError):  # no possible name of a file
        folder = False
    if folder:
        files, pictures = read_folder(path)
        return [sample for file in files for sample in read_jsonl(file)] or pictures
    raise CalibrationError(
        f"There is no calibration source '{shortened(source)}'.",
        "Give 'demo', a JSONL file, a folder of pictures, 'coco' or 'sharegpt4v:FOLDER'.",
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with or without a byte order mark.

    Raises:
        CalibrationError: If a line is not UTF-8 or too long.
    """
    number = 0
    try:
        # a wrong byte becomes half a surrogate pair, so that its line can be named
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise CalibrationError(
                        f"Line {number} of '{path}' has more than {MAX_LINE} characters.",
                        "Name pictures by their files, and cut long texts into several lines.",
                    )
                if not is_unicode(line) or "\0" in line:
                    raise CalibrationError(f"Line {number} of '{path}' is not UTF-8 text.", "Save the file as UTF-8.")
                yield number, line
    except OSError as error:
        raise CalibrationError(f"'{path}' cannot be read: {error.strerror}.", "Check its permissions.") from error
