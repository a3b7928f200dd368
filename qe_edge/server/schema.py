"""Requests and responses of OpenAI's `/v1/chat/completions`, with the fields that this server supports."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from qe_edge.runtime.answer_options import Options
from qe_edge.runtime.answers import Timings
from qe_edge.server.errors import RequestError
from qe_edge.system.errors import shown, shown_name

# OpenAI's fields that are ignored, and fields that are accepted only with the values that change nothing
SILENT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
HARMLESS: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
Count = Annotated[StrictInt, Field(ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against eavesdroppers; this server adds none


class ChatRequest(BaseModel):
    """A request; `top_k`, `min_p` and `repetition_penalty` are not OpenAI's.

    Example:
        >>> request = ChatRequest(model="demo", messages=[{"role": "user", "content": "hello"}], max_tokens=8)
        >>> request.options["max_new_tokens"]
        8
    """

    model_config = ConfigDict(extra="forbid")
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: StrictInt | None = None
    stop: str | list[str] | None = None

    @property
    def options(self) -> Options:
        """Options of the answer."""
        most = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        return {
            "max_new_tokens": most,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": self.stop,
        }


def read_request(body: bytes) -> ChatRequest:
    """Read the request in a body.

    Raises:
        RequestError: If it is no such request, or asks for something that this server does not do.

    Example:
        >>> body = b'{"model": "demo", "messages": [{"role": "user", "content": "hello"}], "n": 1}'
        >>> read_request(body).messages
        [{'role': 'user', 'content': 'hello'}]
        >>> read_request(body.replace(b'"n": 1', b'"n": 2'))
        Traceback (most recent call last):
            ...
        qe_edge.server.errors.RequestError: This server does not do n = 2. Leave n out.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, "The request is not valid JSON. Send a JSON object in UTF-8.") from error
    if not isinstance(values, dict):
        raise RequestError(400, "The request is no JSON object. Send one with 'model' and 'messages'.")
    for name in SILENT:
        values.pop(name, None)
    for name, harmless in HARMLESS.items():
        value = values.pop(name, None)
        if value is not None and value not in harmless:
            raise RequestError(400, f"This server does not do {name} = {shown(value)}. Leave {name} out.")
    try:
        request = ChatRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:3])
        raise RequestError(400, f"'{shown_name(where)}' is wrong: {first['msg'].lower()}. Correct it.") from error
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise RequestError(400, "The request has both max_tokens and max_completion_tokens. Keep one of them.")
    return request


def conversation(request: ChatRequest) -> list[dict[str, Any]]:
    """Return the messages without null fields; the role "developer" becomes "system".

    Example:
        >>> message = {"role": "developer", "content": "Answer in one word.", "name": None}
        >>> conversation(ChatRequest(model="demo", messages=[message]))
        [{'role': 'system', 'content': 'Answer in one word.'}]
    """
    found = []
    for message in request.messages:
        kept = {name: value for name, value in message.items() if value is not None or name == "content"}
        if kept.get("role") == "developer":
            kept["role"] = "system"
        found.append(kept)
    return found


def usage(timings: Timings) -> dict[str, Any]:
    """Return the numbers of tokens of a prompt and its answer, as OpenAI writes them.

    Example:
        >>> usage(Timings(0, 0.01, 0.02, 0, 0.1, 0.13, 0.02, prompt_tokens=90, reused_tokens=64, answer_tokens=2))
        {'prompt_tokens': 90, 'completion_tokens': 2, 'total_tokens': 92, 'prompt_tokens_details':
        {'cached_tokens': 64}}
    """
    prompt, answer = timings.prompt_tokens, timings.answer_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": timings.reused_tokens},
    }


def choice(key: str, content: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    """Return the one choice of a completion (`key` "message") or of a chunk (`key` "delta").

    Example:
        >>> choice("message", {"role": "assistant", "content": "yes"}, "stop")
        {'index': 0, 'message': {'role': 'assistant', 'content': 'yes'}, 'logprobs': None, 'finish_reason': 'stop'}
    """
    return {"index": 0, key: content, "logprobs": None, "finish_reason": finish_reason}
