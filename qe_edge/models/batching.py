"""From prompts to a left-padded batch: what every family does the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qe_edge.errors import InputError, ModelError
from qe_edge.models.chat_templates import PICTURE_QUESTION, REMEDY, check_template, render_question
from qe_edge.models.family import TEXT, Encoded, Sample
from qe_edge.models.images import open_image


@dataclass(frozen=True)
class Row:
    """Tokens of one sample.

    Attributes:
        ids: Prompt, then perhaps the reference answer.
        prompt_length: How many of them are the prompt.
    """

    ids: list[int]
    prompt_length: int


def prepare_pictures(image_processor: Any, samples: Sequence[Sample], **options: Any) -> dict[str, np.ndarray]:  # noqa: ANN401
    """Arrays that an image processor of transformers makes of the samples' pictures; empty when there is none.

    Raises:
        InputError: If a picture cannot be read or has a shape that the processor refuses.
    """
    pictures = [open_image(sample.image) for sample in samples if sample.image is not None]
    if not pictures:
        return {}
    try:
        return dict(image_processor(images=pictures, return_tensors="np", **options))
    except ValueError as error:
        sizes = ", ".join(sorted({"x".join(map(str, picture.size)) for picture in pictures}))
        raise InputError(
            f"A picture cannot be prepared for the model: {error} (sizes: {sizes}).", "Crop or scale the picture."
        ) from error


def encode_row(tokenizer: Any, sample: Sample, picture: tuple[int, list[int]], *, answer: bool) -> Row:  # noqa: ANN401
    """Tokenize one sample in the form that the tokenizer's chat template gives it; running text as it is.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        sample: The question, perhaps with a picture and a reference answer.
        picture: The image token that the template writes, and the tokens that stand for this sample's picture in its
            place (empty for a sample without one).
        answer: Whether the reference answer follows the prompt, closed by the end-of-turn token.

    Raises:
        InputError: If the question or the answer itself holds image tokens.
    """
    image_token, picture_tokens = picture
    if sample.kind == TEXT and sample.image is None:
        ids = encode_text(tokenizer, sample.question)
        if image_token in ids:
            raise InputError("A text holds an image token.", "Leave image tokens out of it.")
        return Row(ids, len(ids))
    content: list[dict[str, str]] = [{"type": "text", "text": sample.question}]
    if sample.image is not None:
        content.insert(0, {"type": "image"})
    prompt = render_question(tokenizer, content)
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if ids.count(image_token) != (sample.image is not None):
        raise InputError("The question holds an image token.", "Leave image tokens out of the question's text.")
    if sample.image is not None:
        at = ids.index(image_token)
        ids = [*ids[:at], *picture_tokens, *ids[at + 1 :]]
    reply = answer_tokens(tokenizer, sample) if answer else []
    if image_token in reply:
        raise InputError("An answer holds an image token.", "Leave image tokens out of the answer's text.")
    return Row([*ids, *reply], len(ids))


def encode_text(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401 - tokenizers share no typed base
    """Running text with the special tokens that the tokenizer puts around text, no chat template.

    Raises:
        InputError: If it has no token.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]  # its length is the family's to check
    if not ids:
        raise InputError("A text is empty.", "Leave empty texts out.")
    return ids


def answer_tokens(tokenizer: Any, sample: Sample) -> list[int]:  # noqa: ANN401 - tokenizers share no typed base
    """The reference answer closed by the end-of-turn token; empty where there is none."""
    if sample.answer is None:
        return []
    return [*tokenizer(sample.answer, add_special_tokens=False)["input_ids"], int(tokenizer.eos_token_id)]


def check_chat_template(tokenizer: Any, folder: str, image_token: int) -> None:  # noqa: ANN401
    """Refuse a tokenizer whose chat template is missing or does not write the image token once per picture.

    Raises:
        ModelError: If so.
    """
    if tokenizer.chat_template is None:
        raise ModelError(f"The tokenizer of '{folder}' has no chat template.", REMEDY)
    check_template(tokenizer, folder, PICTURE_QUESTION)
    prompt = render_question(tokenizer, PICTURE_QUESTION)
    if tokenizer(prompt, add_special_tokens=False)["input_ids"].count(image_token) != 1:
        raise ModelError(
            f"The chat template of '{folder}' does not write image token {image_token} once per picture.", REMEDY
        )


def check_context(rows: Sequence[Row], context: int) -> None:
    """Refuse samples that are longer than the model's context, before anything of their length squared is made.

    Raises:
        InputError: If one is.
    """
    longest = max(len(row.ids) for row in rows)
    if longest > context:
        raise InputError(
            f"A text has {longest} tokens; the model reads {context}.", "Cut it into pieces, or scale its picture down."
        )


def left_pad(
    rows: Sequence[Row],
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
    image_token: int,
    pixels: dict[str, np.ndarray],
) -> Encoded:
    """Bring rows to one length; padding stands on the left, so that generation continues every row on the right."""
    length = max(len(row.ids) for row in rows)
    # masked everywhere, so any valid token will do where the tokenizer names none
    pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    if pad == image_token:  # counted as pictures, it would be: fine-tuning leaves such padding
        pad = 0 if image_token else 1
    input_ids = np.full((len(rows), length), pad, np.int64)
    attention_mask = np.zeros((len(rows), length), np.int64)
    answer_mask = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        start = length - len(row.ids)
        input_ids[number, start:] = row.ids
        attention_mask[number, start:] = 1
        answer_mask[number, start + row.prompt_length :] = True
    return Encoded(input_ids, attention_mask, input_ids == image_token, answer_mask, pixels)
