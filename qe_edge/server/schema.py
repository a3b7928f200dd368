"""OpenAI's request and responses of `/v1/chat/completions`, as far as a model can obey them."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from qe_edge.runtime.answer_options import Options
from qe_edge.runtime.answers import Timings
from qe_edge.server.errors import RequestError
from qe_edge.system.errors import shown, shown_name

# fields of OpenAI's that say nothing to the model, and others with their values of no effect
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
    """Of a streamed answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False  # padding against eavesdroppers, of which we add none


class ChatRequest(BaseModel):
    """A request; `top_k`, `min_p` and `repetition_penalty` are not OpenAI's."""

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
        """What it says about the answer."""
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
    """The request that a body holds.

    Raises:
        RequestError: If it is no such request, or asks for what no answer obeys.
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
    """The messages, without fields that are null; a developer is the system."""
    found = []
    for message in request.messages:
        kept = {name: value for name, value in message.items() if value is not None or name == "content"}
        if kept.get("role") == "developer":
            kept["role"] = "system"
        found.append(kept)
    return found


def usage(timings: Timings) -> dict[str, Any]:
    """Tokens that an answer took."""
    prompt, answer = timings.prompt_tokens, timings.answer_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": timings.reused_tokens},
    }


def choice(key: str, content: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
    """The one choice of a completion (`key` "message") or of a chunk ("delta")."""
    return {"index": 0, key: content, "logprobs": None, "finish_reason": finish_reason}
