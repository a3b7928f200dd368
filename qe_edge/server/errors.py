"""Errors in the format that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Mapping

from qe_edge.system.errors import InputError, QEError, UnknownNameError


class RequestError(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: HTTP status.
        message: The problem and the remedy.
        headers: Further headers.

    Example:
        >>> error = RequestError(404, "There is no such model here. Ask for 'demo'.")
        >>> error.status, error.body["error"]["type"]
        (404, 'invalid_request_error')
    """

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        # the message may repeat what JSON holds and UTF-8 does not: half a surrogate pair
        self.status, self.message = status, message.encode(errors="backslashreplace").decode()
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, object]:
        """Body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": None}}


def as_request_error(error: QEError) -> RequestError:
    """Convert an error: mistakes of the client get status 400, failures of the server 500.

    Example:
        >>> as_request_error(InputError("The picture cannot be read.", "Send a PNG.")).status
        400
    """
    mistake = isinstance(error, InputError | UnknownNameError)
    return RequestError(400 if mistake else 500, f"{error.problem} {error.remedy}")
