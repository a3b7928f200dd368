"""Refusals as OpenAI's clients read them."""

from __future__ import annotations

from collections.abc import Mapping

from qe_edge.system.errors import InputError, QEError, UnknownNameError


class RequestError(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: HTTP status.
        message: What is wrong and what to do.
        headers: Further headers.
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        # the message may repeat what JSON holds and UTF-8 does not: half a surrogate pair
        self.status, self.message = status, message.encode(errors="backslashreplace").decode()
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """What the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": None}}


def as_request_error(error: QEError) -> RequestError:
    """The client's mistakes have status 400, ours 500."""
    mistake = isinstance(error, InputError | UnknownNameError)
    return RequestError(400 if mistake else 500, f"{error.problem} {error.remedy}")
