"""Limits of a server: sizes, numbers and times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qe_edge.system.errors import InputError

MAX_KEY = 4096  # bytes


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server.

    Attributes:
        model: The name under which clients ask for the model.
        api_key: The bearer token that clients must send; None if they need none.
        queue: Requests that may wait while others are answered; more are refused with 429.
        max_request_bytes: The largest size of a request.
        max_pictures: The largest number of pictures of a request.
        max_pixels: The largest number of pixels of all pictures of a request together.
        request_seconds: Seconds until a request must have arrived.
        answer_seconds: Seconds after which an answer is given up, waiting included.
        grace_seconds: Seconds that running answers have after the server was asked to stop.
        picture_folder: Folder whose files requests may name as pictures; None refuses files.
        picture_hosts: Hosts from which pictures may be downloaded.
    """

    model: str
    api_key: str | None = None
    queue: int = 32
    max_request_bytes: int = 32 << 20
    max_pictures: int = 16
    max_pixels: int = 1 << 27
    request_seconds: float = 30.0
    answer_seconds: float = 300.0
    grace_seconds: float = 30.0
    picture_folder: Path | None = None
    picture_hosts: tuple[str, ...] = ()


def read_api_key(path: Path) -> str:
    r"""Read the key in a file.

    Raises:
        InputError: If there is no such file, or no key of visible ASCII characters in it.

    Example:
        >>> _ = Path("key.txt").write_text("secret-key\n")
        >>> read_api_key(Path("key.txt"))
        'secret-key'
    """
    try:
        with path.open("rb") as file:
            key = file.read(MAX_KEY + 1).strip()
    except OSError as error:
        raise InputError(f"The API key's file '{path}' cannot be read.", "Correct --api-key-file.") from error
    if not 0 < len(key) <= MAX_KEY or not all(33 <= byte <= 126 for byte in key):
        raise InputError(f"'{path}' holds no API key.", "Write one line of letters, digits and signs into it.")
    return key.decode("ascii")
