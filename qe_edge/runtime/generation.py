"""The settings of a model's generation_config.json, and the rules among them that change logits, in numpy.

PyTorch and every engine call `adjust_logits` on the same logits, so their answers differ by the model alone. For one
prompt the result is what transformers' own logits processors give; in a batch padding never counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from qe_edge.system.errors import CommonNotice, InputError, ModelError, NumericalError
from qe_edge.system.json_files import read_json_table

GENERATION_CONFIG = "generation_config.json"
MIN_PENALTY, MAX_PENALTY = 0.01, 100  # repetition_penalty: beyond them logits in float32 overflow
EDIT = f"Mend it in {GENERATION_CONFIG}."
# settings that change which token a greedy decoder takes and that an engine cannot do, with the values of no effect
REFUSED: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "num_return_sequences": (1,),
    "stop_strings": ([], ()),
    "max_time": (),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([], ()),
    "force_words_ids": ([], ()),
    "constraints": ([], ()),
    "sequence_bias": ({}, [], ()),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
# likewise of settings that matter where tokens are drawn
UNSAMPLED: dict[str, tuple[object, ...]] = {"typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}

TokenIds = Annotated[tuple[Annotated[StrictInt, Field(ge=0)], ...], Field(max_length=1 << 16)]
Count = Annotated[StrictInt, Field(ge=0, le=1 << 24)]


class GenerationSettings(BaseModel):
    """Settings of decoding: the tokens that may come, and the choice among them unless the caller says otherwise.

    Attributes:
        eos_token_ids: Tokens that end an answer.
        pad_token_id: Token that fills up finished rows of a batch.
        repetition_penalty: Logits of tokens that occurred are divided by it if positive, else multiplied.
        no_repeat_ngram_size: No sequence of so many tokens comes twice; 0 allows it.
        min_length: An answer does not end before prompt and answer have so many tokens.
        min_new_tokens: An answer has at least so many tokens.
        suppress_tokens: Tokens that never come.
        begin_suppress_tokens: Tokens that never come first.
        do_sample: Whether `qe_edge.Pipeline` draws tokens where it is not told; everything else is greedy.
        temperature: As in `qe_edge.runtime.sampling.Sampling`, like those that follow.
        top_k: The default is transformers'.
        top_p: Share of the probability that takes part.
        min_p: Least probability that takes part, as a share of the highest one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    eos_token_ids: TokenIds = Field(min_length=1)
    pad_token_id: Annotated[StrictInt, Field(ge=0)]
    repetition_penalty: float = Field(1.0, ge=MIN_PENALTY, le=MAX_PENALTY)
    no_repeat_ngram_size: Count = 0
    min_length: Count = 0
    min_new_tokens: Count = 0
    suppress_tokens: TokenIds = ()
    begin_suppress_tokens: TokenIds = ()
    do_sample: bool = False
    temperature: float = Field(1.0, ge=0, le=100, allow_inf_nan=False)
    top_k: Count = 50
    top_p: float = Field(1.0, ge=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)


def make_settings(values: Mapping[str, Any], config: Any, tokenizer: Any) -> GenerationSettings:  # noqa: ANN401
    """Settings of a model.

    End tokens are those of `values`, else of the configuration, else of its language model; the tokenizer's own end
    token, which closes the reference answers, always ends an answer too.

    Args:
        values: Content of generation_config.json; None stands for a setting that is not there.
        config: The model's configuration.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: If a setting changes the answers and no engine obeys it, if one makes no sense, if a token is
            outside the vocabulary, or if nothing ends an answer.

    Example:
        >>> from transformers import AutoConfig, AutoTokenizer
        >>> from qe_edge.demo import model_path
        >>> config, tokenizer = (kind.from_pretrained(model_path()) for kind in (AutoConfig, AutoTokenizer))
        >>> make_settings({"repetition_penalty": 1.1}, config, tokenizer).repetition_penalty
        1.1
        >>> make_settings({"num_beams": 4}, config, tokenizer)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ModelError: generation_config.json asks for num_beams = 4, which engines cannot do.
        Remove num_beams from generation_config.json; QE-Edge takes the most likely token, or draws one.
    """
    _check_known(values)
    text = config.get_text_config()
    sources = (values.get("eos_token_id"), getattr(config, "eos_token_id", None), getattr(text, "eos_token_id", None))
    ends = next((found for found in map(_token_list, sources) if found), [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if not ends:
        raise ModelError("The model names no token that ends an answer.", f"Add eos_token_id to {GENERATION_CONFIG}.")
    pad = values.get("pad_token_id")
    known = isinstance(pad, int) and not isinstance(pad, bool) and 0 <= pad < text.vocab_size
    chosen = {
        name: values[name]
        for name in GenerationSettings.model_fields
        if name not in ("eos_token_ids", "pad_token_id") and values.get(name) is not None
    }
    try:
        # rows that are finished take any token: their logits are not looked at
        settings = GenerationSettings(eos_token_ids=tuple(ends), pad_token_id=pad if known else ends[0], **chosen)
    except ValidationError as error:
        first = error.errors()[0]
        name = "eos_token_id" if first["loc"][0] in ("eos_token_ids", "pad_token_id") else str(first["loc"][0])
        raise ModelError(f"{name} in {GENERATION_CONFIG} is wrong: {first['msg'].lower()}.", EDIT) from error
    for name, ids in (
        ("eos_token_id", settings.eos_token_ids),
        ("suppress_tokens", settings.suppress_tokens),
        ("begin_suppress_tokens", settings.begin_suppress_tokens),
    ):
        if max(ids, default=0) >= text.vocab_size:
            raise ModelError(
                f"{name} names token {max(ids)}; the model's vocabulary has {text.vocab_size}.",
                f"Mend {name} in {GENERATION_CONFIG}, config.json or the tokenizer's files.",
            )
    return settings


def _check_known(values: Mapping[str, Any]) -> None:
    """Refuse settings that engines do not obey, and say which ones of drawing have no effect.

    Raises:
        ModelError: If the most likely token would be another one.
    """
    for name, harmless in REFUSED.items():
        value = values.get(name)
        if value is not None and value not in harmless:
            raise ModelError(
                f"{GENERATION_CONFIG} asks for {name} = {str(value)[:60]}, which engines cannot do.",
                f"Remove {name} from {GENERATION_CONFIG}; QE-Edge takes the most likely token, or draws one.",
            )
    unmet = [name for name, harmless in UNSAMPLED.items() if values.get(name) not in (None, *harmless)]
    if unmet and values.get("do_sample"):
        warnings.warn(
            f"{GENERATION_CONFIG} asks for {' and '.join(unmet)}, which has no effect in QE-Edge: it draws tokens by "
            "temperature, top_k, top_p and min_p.",
            CommonNotice,
            stacklevel=3,
        )


def _token_list(value: Any) -> list[Any]:  # noqa: ANN401 - any JSON value; its types are checked with the settings
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def settings_of(model: Any, config: Any, tokenizer: Any) -> GenerationSettings:  # noqa: ANN401 - transformers' types
    """Settings of a model in memory, from its `generation_config`.

    Raises:
        ModelError: As `make_settings`.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> loaded = load_model("demo")
        >>> settings_of(loaded.model, loaded.family.config, loaded.processor.tokenizer).do_sample
        False
    """
    generation = getattr(model, "generation_config", None)
    return make_settings({} if generation is None else generation.to_dict(), config, tokenizer)


def read_settings(folder: Path, config: Any, tokenizer: Any) -> GenerationSettings:  # noqa: ANN401 - transformers' types
    """Settings of a model's folder, before its weights are read.

    Raises:
        ModelError: As `make_settings`, or if generation_config.json is broken.

    Example:
        >>> from transformers import AutoConfig, AutoTokenizer
        >>> from qe_edge.demo import model_path
        >>> config, tokenizer = (kind.from_pretrained(model_path()) for kind in (AutoConfig, AutoTokenizer))
        >>> read_settings(model_path(), config, tokenizer).do_sample
        False
    """
    path = folder / GENERATION_CONFIG
    remedy = "Get the file again from the original model, or delete it to decode without settings."
    values = read_json_table(path, error=ModelError, remedy=remedy) if path.exists() or path.is_symlink() else {}
    return make_settings(values, config, tokenizer)


def adjust_logits(
    settings: GenerationSettings, logits: np.ndarray, tokens: np.ndarray, mask: np.ndarray, new: int
) -> np.ndarray:
    """Logits of the next token after the settings' rules, in the order of transformers.

    Args:
        settings: The rules.
        logits: float32 `[batch, vocabulary]`; not changed.
        tokens: Prompt and answer so far, int64 `[batch, tokens]`.
        mask: 0 on padding, `[batch, tokens]`.
        new: Tokens of the answer so far.

    Returns:
        float32 `[batch, vocabulary]`; -inf for tokens that must not come.

    Example:
        >>> rules = GenerationSettings(eos_token_ids=(0,), pad_token_id=0, repetition_penalty=2.0, min_new_tokens=1)
        >>> logits = np.array([[9.0, 4.0, -1.0]], np.float32)
        >>> adjust_logits(rules, logits, np.array([[1, 2]]), np.array([[1, 1]]), new=0).tolist()
        [[-inf, 2.0, -2.0]]
    """
    scores = np.array(logits, np.float32)
    penalty, size = np.float32(settings.repetition_penalty), settings.no_repeat_ngram_size
    ends = list(settings.eos_token_ids)
    for row, (ids, valid) in enumerate(zip(tokens, mask.astype(bool), strict=True)):
        history = ids[valid]
        if penalty != 1:
            seen = np.unique(history[history < scores.shape[1]])
            found = scores[row, seen]
            scores[row, seen] = np.where(found < 0, found * penalty, found / penalty)
        if 0 < size <= len(history):
            windows = np.lib.stride_tricks.sliding_window_view(history, size)
            repeated = (windows[:, :-1] == history[len(history) + 1 - size :]).all(-1)
            scores[row, windows[repeated, -1]] = -np.inf
        if len(history) < settings.min_length:
            scores[row, ends] = -np.inf
    if new < settings.min_new_tokens:
        scores[:, ends] = -np.inf
    scores[:, list(settings.suppress_tokens)] = -np.inf
    if new == 0:
        scores[:, list(settings.begin_suppress_tokens)] = -np.inf
    return scores


def check_finite(values: np.ndarray, what: str) -> None:
    """Refuse numbers that are not finite.

    Args:
        values: Any floats.
        what: Their name for the message: "The logits of the engine".

    Raises:
        NumericalError: If one is NaN or infinite.

    Example:
        >>> check_finite(np.array([0.0, np.nan]), "The logits of the engine")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.NumericalError: The logits of the engine are not finite: they hold NaN or infinity.
        Check the original model's weights with 'qe-edge validate'; quantize again with another method or scheme.
    """
    if not np.isfinite(values).all():
        raise NumericalError(
            f"{what} are not finite: they hold NaN or infinity.",
            "Check the original model's weights with 'qe-edge validate'; quantize again with another method or scheme.",
        )


def check_context(prompt: int, new: int, context: int) -> None:
    """Refuse a prompt and an answer that are longer than a model's context, before it reads the prompt.

    Args:
        prompt: Tokens of the longest prompt, pictures included.
        new: Most tokens of its answer.
        context: Tokens that the model can attend to.

    Raises:
        InputError: If they do not fit.

    Example:
        >>> check_context(prompt=500, new=12, context=512)
        >>> check_context(prompt=500, new=13, context=512)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: The prompt has 500 tokens and the answer up to 13; together at most 512
        fit. Ask for at most 12 tokens, or shorten the prompt, or use a smaller picture.
    """
    if new < 0:
        raise InputError(f"An answer cannot have {new} tokens.", "Ask for at least 1.")
    if prompt + new > context:
        room = context - prompt
        remedy = f"Ask for at most {room} tokens, or shorten" if room > 0 and new else "Shorten"
        raise InputError(
            f"The prompt has {prompt} tokens and the answer up to {new}; together at most {context} fit.",
            f"{remedy} the prompt, or use a smaller picture.",
        )
