"""Options of an answer: the caller's choices, and the model's own settings for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from qe_edge.runtime.detokenizer import StopStrings
from qe_edge.runtime.generation import MAX_PENALTY, MIN_PENALTY, GenerationSettings
from qe_edge.runtime.sampling import Random, Sampling, check_count
from qe_edge.system.errors import InputError, UnknownNameError, shown

SAMPLED = ("temperature", "top_k", "top_p", "min_p")


class Options(TypedDict, total=False):
    """What a caller may say about an answer; `answer_options` describes it."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class AnswerOptions:
    """How an answer is made.

    Attributes:
        max_new_tokens: Most tokens; None for as many as fit into the context.
        sampling: How a token is chosen.
        rules: Rules that change logits before a token is chosen.
        seed: Seed of the random numbers; None for one that nobody knows.
        stop: Strings that end the answer.
    """

    max_new_tokens: int | None
    sampling: Sampling
    rules: GenerationSettings
    seed: int | None
    stop: tuple[str, ...]


def answer_options(settings: GenerationSettings, options: Options) -> AnswerOptions:
    """Options of an answer. An option that is None comes from the model's generation_config.json.

    Tokens are drawn if that file says so, or if one of `temperature`, `top_p`, `top_k` and `min_p` is given. A
    temperature of 0 takes the most likely token whatever else is given.

    Args:
        settings: Settings of the model.
        options: Any of these.

            - `max_new_tokens`: most tokens of the answer; None for as many as fit into the context.
            - `temperature`, `top_p`, `top_k`, `min_p`: see `qe_edge.runtime.sampling.Sampling`.
            - `repetition_penalty`: above 1 makes tokens less likely that were there before.
            - `seed`: the same seed gives the same answer to the same question; from 0 to 2^64 - 1.
            - `stop`: a string or several that end the answer.

    Raises:
        UnknownNameError: If there is no such option.
        InputError: If one of them makes no sense.

    Example:
        >>> rules = GenerationSettings(eos_token_ids=(0,), pad_token_id=0)
        >>> answer_options(rules, {"temperature": 0.7}).sampling
        Sampling(temperature=0.7, top_k=50, top_p=1.0, min_p=0.0)
    """
    for name in options:
        if name not in Options.__annotations__:
            raise UnknownNameError("option", name, Options.__annotations__)
    most, penalty, stop = options.get("max_new_tokens"), options.get("repetition_penalty"), options.get("stop")
    if most is not None:
        check_count("max_new_tokens", most, 1)
    if penalty is not None:
        settings = settings.model_copy(update={"repetition_penalty": _penalty(penalty)})
    given = {name: value for name, value in options.items() if name in SAMPLED and value is not None}
    chosen: dict[str, Any] = {name: getattr(settings, name) for name in SAMPLED} | given
    sampling = Sampling(**chosen)  # checks all of them
    if not settings.do_sample and not given:
        sampling = Sampling()
    Random(options.get("seed"))  # checks it
    if stop is not None and not isinstance(stop, str | list | tuple):
        raise InputError(f"stop is {shown(stop)}.", "Give a text, or a list of texts.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    StopStrings(stops)  # checks them
    return AnswerOptions(most, sampling, settings, options.get("seed"), stops)


def _penalty(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_PENALTY <= value <= MAX_PENALTY:
        raise InputError(
            f"repetition_penalty is {shown(value)}.",
            f"Give a number from {MIN_PENALTY} to {MAX_PENALTY}; 1 has no effect.",
        )
    return float(value)
