"""Samples of every kind that a vision-language model is asked, and what its exported graphs make of them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.models.samples import Turn


def noise(width: int, height: int) -> Image.Image:
    """A picture of noise, always the same for a size."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


SQUARE, WIDE, TALL, ODD = noise(64, 64), noise(300, 60), noise(56, 168), noise(117, 203)
SHORT = Sample(SQUARE, "what shape is in the image?", "circle")
CASES: dict[str, list[Sample]] = {
    "square": [SHORT],
    "panorama": [Sample(WIDE, "is there a red shape?", "yes")],
    "odd sizes": [Sample(ODD, "what is it?", "a circle")],
    "two pictures": [Sample((SQUARE, TALL), "what differs?", "the shape")],
    "picture last": [Sample(SQUARE, "what is in this image", "circle", marks=(21,))],
    "several turns": [
        Sample(
            (SQUARE, ODD, WIDE),
            "and is there a blue shape in the third one?",
            "no",
            earlier=(
                Turn("user", "is there a red shape?", (0, 10)),
                Turn("assistant", "yes"),
            ),
        )
    ],
    "batch": [
        SHORT,
        Sample(None, "is it?", "no"),
        Sample((TALL, ODD), "what is the color of the shape in these very images?", "teal"),
    ],
    "text only": [Sample(None, "what is the color of a red shape?", "red")],
    "long": [Sample(SQUARE, "is there a red shape in the image? " * 60, "yes")],
}


def torch_logits(loaded: LoadedModel, samples: list[Sample]) -> np.ndarray:
    """Logits of transformers' own class, teacher-forced."""
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, samples, answers=True))
    with torch.no_grad():
        logits: np.ndarray = loaded.model(**inputs).logits.float().numpy()
    return logits


def greedy(loaded: LoadedModel, samples: list[Sample], tokens: int) -> list[list[int]]:
    """Greedy answers of transformers' own class, each without the token that ended it."""
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, samples))
    end = loaded.processor.tokenizer.eos_token_id
    ids = loaded.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
    answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [answer[: answer.index(end)] if end in answer else answer for answer in answers]
