"""Example questions for the report: disagreements first, then one of every kind and topic."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.videos import Video, open_video
from qe_edge.validate.answers import is_right_for
from qe_edge.validate.schema import Answer, Example, Role

COUNT = 8
MAX_SIDE = 256  # pixels of an embedded picture


def choose_examples(samples: Sequence[Sample], answers: Mapping[Role, Sequence[str]]) -> list[Example]:
    """Up to eight questions with the answers of every model.

    At most half of them are questions on which the models differ. A page of nothing but differences would make the
    model look worse than it is.

    Example:
        >>> from qe_edge.calibration.sources import load_evaluation
        >>> samples = load_evaluation("demo")[:20]
        >>> right = [sample.answer for sample in samples]
        >>> examples = choose_examples(samples, {"original": right, "quantized": ["no idea", *right[1:]]})
        >>> examples[0].question, [(answer.text, answer.correct) for answer in examples[0].answers]
        ('is no rectangle present?', [('yes', True), ('no idea', False)])
        >>> len(examples)
        8
    """
    rows = range(len(samples))
    differing = [row for row in rows if len({texts[row] for texts in answers.values()}) > 1]
    chosen = differing[: COUNT // 2]
    seen: set[tuple[str, str]] = set()
    for row in rows:
        label = (samples[row].kind, samples[row].topic)
        if label not in seen and row not in chosen:
            chosen.append(row)
            seen.add(label)
    chosen += [row for row in rows if row not in chosen]
    return [_example(samples[row], {role: texts[row] for role, texts in answers.items()}) for row in chosen[:COUNT]]


def _example(sample: Sample, answers: Mapping[Role, str]) -> Example:
    earlier = [f"{turn.role}: {turn.text}" for turn in sample.earlier]
    return Example(
        picture=_picture(sample),
        question="\n".join([*earlier, sample.question]),
        reference=" / ".join(sample.references),
        kind=sample.kind,
        answers=[Answer(role=role, text=text, correct=is_right_for(sample, text)) for role, text in answers.items()],
    )


def _picture(sample: Sample) -> str | None:
    """A small PNG in Base64; several pictures stand side by side, of a video its first frame."""
    shown = []
    for source in sample.media:
        shown.append(open_video(source).read([0])[0] if isinstance(source, Video) else open_image(source))
        shown[-1].thumbnail((MAX_SIDE, MAX_SIDE))
    if not shown:
        return None
    sheet = Image.new(
        "RGB", (sum(picture.width for picture in shown), max(picture.height for picture in shown)), "white"
    )
    left = 0
    for picture in shown:
        sheet.paste(picture, (left, 0))
        left += picture.width
    data = io.BytesIO()
    sheet.save(data, format="PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode("ascii")
