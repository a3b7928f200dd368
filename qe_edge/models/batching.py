"""Encode prompts as a left-padded batch; all families share these steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qe_edge.models.chat import Rewrite, answer_ids, as_it_is, chat_ids, earlier_answers, text_ids
from qe_edge.models.chat_templates import PICTURE_QUESTION, REMEDY, check_template, render_question
from qe_edge.models.family import TEXT, Encoded, Sample
from qe_edge.models.images import open_image
from qe_edge.models.video_plans import Planned, plan_videos, prepare_video
from qe_edge.models.videos import Video
from qe_edge.system.errors import InputError, ModelError

MAX_VALUES = 1 << 30  # of all pictures of a batch, after preparation; 4 GiB in float32


@dataclass(frozen=True)
class Row:
    """Tokens of one sample.

    Attributes:
        ids: Prompt, then perhaps the reference answer.
        prompt_length: Number of ids of the prompt.
        earlier: Places in the prompt of the assistant's earlier answers.
    """

    ids: list[int]
    prompt_length: int
    earlier: tuple[int, ...] = ()


def prepare_pictures(
    image_processor: Any,  # noqa: ANN401 - image processors share no typed base
    samples: Sequence[Sample],
    video_processor: Any = None,  # noqa: ANN401 - or what stands for it
    **options: Any,  # noqa: ANN401 - the image processor's own
) -> dict[str, np.ndarray]:
    """Prepare the samples' pictures and videos; empty if there are none.

    They are decoded and prepared one by one, in the samples' order, so that only one of them is in memory.

    Args:
        image_processor: An image processor of transformers.
        samples: The samples.
        video_processor: What prepares videos, as `qe_edge.models.qwen_vl_videos` does; None where nothing does.
        **options: Options of the image processor.

    Raises:
        InputError: If a picture or a video cannot be read, has a shape that the processor refuses, or becomes an array
            of another shape than earlier ones, if all together would fill the memory, or if the model takes no videos.
            The message names the sample.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.configuration import load_family
        >>> processor = load_family(str(model_path())).load_processor(str(model_path()))
        >>> pictures = [Sample(np.zeros((side, 64, 3), np.uint8), "what?") for side in (64, 128)]
        >>> arrays = prepare_pictures(processor.image_processor, pictures)
        >>> arrays["image_grid_thw"].tolist()  # frames, rows and columns of patches
        [[1, 8, 8], [1, 12, 6]]
        >>> arrays["pixel_values"].shape
        (136, 1176)
    """
    found: dict[str, list[np.ndarray]] = {}
    for sample in samples:
        with naming(sample):
            planned = iter(_planned(video_processor, sample))
            for shown in sample.media:
                if isinstance(shown, Video):
                    prepared = prepare_video(video_processor, next(planned))
                else:
                    prepared = _prepare(image_processor, open_image(shown), options)
                _add(found, prepared)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _planned(video_processor: Any, sample: Sample) -> list[Planned]:  # noqa: ANN401 - as above
    if sample.videos and video_processor is None:
        raise InputError(
            "This model reads no videos here, or its folder has no settings for them.",
            "Give pictures, or copy video_preprocessor_config.json from the original model.",
        )
    return plan_videos(video_processor, sample.videos) if sample.videos else []


def _add(found: dict[str, list[np.ndarray]], prepared: dict[str, np.ndarray]) -> None:
    """Append the arrays of a picture or a video to those of earlier ones."""
    for name, array in prepared.items():
        arrays = found.setdefault(name, [])
        if arrays and arrays[0].shape[1:] != array.shape[1:]:
            raise InputError(
                f"A picture becomes an array of {_sizes(array)} for the model, and one before it of "
                f"{_sizes(arrays[0])}.",
                "Set do_center_crop or a height and a width in preprocessor_config.json, or give pictures of one "
                "shape.",
            )
        arrays.append(array)
    values = sum(array.size for arrays in found.values() for array in arrays)
    if values > MAX_VALUES:
        raise InputError(
            f"The pictures of one batch become {values} numbers for the model; up to {MAX_VALUES} fit.",
            "Scale the pictures down, or lower the picture size in preprocessor_config.json.",
        )


def _sizes(array: np.ndarray) -> str:
    """The sizes of one entry of a batch."""
    return " x ".join(map(str, array.shape[1:]))


def _prepare(image_processor: Any, picture: Image.Image, options: dict[str, Any]) -> dict[str, np.ndarray]:  # noqa: ANN401
    try:
        arrays = image_processor(images=[picture], return_tensors="np", **options)
    except ValueError as error:
        size = "x".join(map(str, picture.size))
        raise InputError(
            f"A picture cannot be prepared for the model: {error} (size: {size}).", "Crop or scale the picture."
        ) from error
    return {name: np.asarray(array) for name, array in arrays.items()}


@contextmanager
def naming(sample: Sample) -> Iterator[None]:
    """Add a sample's origin to errors inside the context.

    Raises:
        InputError: The same error with the sample's origin in front.

    Example:
        >>> with naming(Sample(None, "?", origin="line 7 of 'data.jsonl'")):
        ...     raise InputError("The picture is missing.", "Add it.")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: line 7 of 'data.jsonl': The picture is missing. Add it.
    """
    try:
        yield
    except InputError as error:
        if not sample.origin:
            raise
        raise InputError(f"{sample.origin}: {error.problem}", error.remedy) from error


def encode_row(
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
    sample: Sample,
    image_token: int,
    pictures: Sequence[list[int]],
    *,
    answer: bool,
    rewrite: Rewrite = as_it_is,
    video_token: int | None = None,
    videos: Sequence[list[int]] = (),
) -> Row:
    """Tokenize one sample: a question through the tokenizer's chat template, running text as it is.

    Args:
        tokenizer: A tokenizer of transformers with a chat template.
        sample: The question, perhaps with pictures, earlier turns and a reference answer.
        image_token: The token that the template writes for a picture.
        pictures: For each of the sample's pictures the tokens that replace its image token.
        answer: Whether the reference answer follows the prompt, closed by the end-of-turn token.
        rewrite: Changes the prompt before it is tokenized.
        video_token: The token that the rewritten prompt has for a video, or for each part of it.
        videos: For each of these places the tokens that replace it.

    Raises:
        InputError: If the template or the tokenizer cannot read the sample.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        >>> sample = Sample("a.png", "is it red?", "yes")
        >>> row = encode_row(tokenizer, sample, image, pictures=[[image] * 4], answer=True)
        >>> row.ids.count(image), tokenizer.decode(row.ids[row.prompt_length :])
        (4, 'yes<|im_end|>')
    """
    check_no_robot(sample)
    spoken: list[int] = []
    if sample.kind == TEXT and sample.image is None:
        ids = encode_text(tokenizer, sample.question)
    else:
        turns = sample.conversation
        ids = chat_ids(tokenizer, turns, as_parts=True, rewrite=rewrite)
        spoken = earlier_answers(tokenizer, turns, ids, as_parts=True, rewrite=rewrite) if answer else []
    reply = answer_ids(tokenizer, sample) if answer else []
    places = {image_token: ("image", pictures), **({} if video_token is None else {video_token: ("video", videos)})}
    for token, (what, shown) in places.items():
        if token in reply or ids.count(token) != len(shown):
            noun = "picture" if what == "image" else "video"
            raise InputError(
                f"The prompt has {[*ids, *reply].count(token)} {what} tokens, and {len(shown)} places of a {noun}.",
                f"Leave {what} tokens out of the texts, or use a chat template that writes one per {noun}.",
            )
    waiting = {token: iter(shown) for token, (_, shown) in places.items()}
    filled: list[int] = []
    starts = []  # of every id
    for number in ids:
        starts.append(len(filled))
        filled += next(waiting[number]) if number in waiting else [number]
    return Row([*filled, *reply], len(filled), tuple(starts[index] for index in spoken))


def check_no_robot(sample: Sample) -> None:
    """Refuse a robot's state, of a model that would not read it.

    Raises:
        InputError: If there is one.

    Example:
        >>> check_no_robot(Sample(None, "What is a robot?"))  # fine
    """
    if sample.state is not None or sample.actions is not None:
        raise InputError(
            "This model makes no actions, and there is a robot's state.", "Leave 'state' and 'actions' out."
        )


def encode_text(tokenizer: Any, text: str) -> list[int]:  # noqa: ANN401 - tokenizers share no typed base
    """Tokenize running text without a chat template, with the tokenizer's special tokens around it.

    Raises:
        InputError: If it has no token.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> tokenizer.decode(encode_text(tokenizer, "what color is it?"))
        'what color is it?'
    """
    ids = text_ids(tokenizer, text, add_special_tokens=True)
    if not ids:
        raise InputError("A text is empty.", "Leave empty texts out.")
    return ids


def check_length(row: Row, context: int, what: str) -> None:
    """Refuse a sample that is longer than the model's context.

    Args:
        row: The sample's tokens.
        context: The largest number of tokens that the model reads.
        what: Name of the sample in messages.

    Raises:
        InputError: If it is too long.

    Example:
        >>> check_length(Row([5, 6, 7], prompt_length=3), context=2, what="The prompt")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: The prompt has 3 tokens; the model reads 2. Shorten the text, use
        smaller pictures, or cut running text into pieces, one a line.
    """
    if len(row.ids) > context:
        raise InputError(
            f"{what} has {len(row.ids)} tokens; the model reads {context}.",
            "Shorten the text, use smaller pictures, or cut running text into pieces, one a line.",
        )


def check_chat_template(tokenizer: Any, folder: str, image_token: int) -> None:  # noqa: ANN401
    """Refuse a tokenizer whose chat template is missing or does not write the image token once per picture.

    Raises:
        ModelError: If so.

    Example:
        >>> from qe_edge.demo import model_path
        >>> from qe_edge.models.tokenizers import load_tokenizer
        >>> tokenizer = load_tokenizer(str(model_path()), vocabulary=10_000)
        >>> image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        >>> check_chat_template(tokenizer, str(model_path()), image)  # fine: it writes the token once per picture
    """
    if tokenizer.chat_template is None:
        raise ModelError(f"The tokenizer of '{folder}' has no chat template.", REMEDY)
    check_template(tokenizer, folder, PICTURE_QUESTION)
    prompt = render_question(tokenizer, PICTURE_QUESTION)
    if tokenizer(prompt, add_special_tokens=False)["input_ids"].count(image_token) != 1:
        raise ModelError(
            f"The chat template of '{folder}' does not write image token {image_token} once per picture.", REMEDY
        )


def left_pad(
    rows: Sequence[Row],
    tokenizer: Any,  # noqa: ANN401 - tokenizers share no typed base
    image_token: int,
    pixels: dict[str, np.ndarray],
    video_token: int | None = None,
) -> Encoded:
    """Bring rows to one length; padding stands on the left, so that generation continues every row on the right.

    Args:
        rows: The rows.
        tokenizer: Names the padding.
        image_token: The token of a picture's feature.
        pixels: As in `Encoded`.
        video_token: The token of a video's feature.

    Example:
        >>> from types import SimpleNamespace
        >>> rows = [Row([5, 6, 7], prompt_length=2), Row([8], prompt_length=1)]
        >>> encoded = left_pad(rows, SimpleNamespace(pad_token_id=0), image_token=9, pixels={})
        >>> encoded.input_ids.tolist(), encoded.attention_mask.tolist(), encoded.answer_mask.tolist()
        ([[5, 6, 7], [0, 0, 8]], [[1, 1, 1], [0, 0, 1]], [[False, False, True], [False, False, False]])
    """
    length = max(len(row.ids) for row in rows)
    # masked everywhere, so any valid token will do where the tokenizer names none
    pad = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    features = [image_token] if video_token is None else [image_token, video_token]
    if pad in features:  # counted as pictures, it would be: fine-tuning leaves such padding
        pad = next(number for number in range(3) if number not in features)
    input_ids = np.full((len(rows), length), pad, np.int64)
    attention_mask = np.zeros((len(rows), length), np.int64)
    answer_mask = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        start = length - len(row.ids)
        input_ids[number, start:] = row.ids
        attention_mask[number, start:] = 1
        answer_mask[number, start + row.prompt_length :] = True
        answer_mask[number, [start + place for place in row.earlier]] = True
    return Encoded(input_ids, attention_mask, np.isin(input_ids, features), answer_mask, pixels)
