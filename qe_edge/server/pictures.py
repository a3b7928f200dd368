"""Pictures that requests name: data addresses, and files and downloads if the settings allow them."""

from __future__ import annotations

import http.client
import ssl
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from qe_edge.models.images import Picture, count_pixels
from qe_edge.models.messages import data_bytes
from qe_edge.models.texts import shortened
from qe_edge.models.videos import Video, count_video_pixels
from qe_edge.server.settings import ServerSettings
from qe_edge.system.errors import InputError

MAX_DOWNLOAD = 64 << 20
SECONDS = 10  # longest time without a byte of a download
DOWNLOAD_SECONDS = 30  # longest time of a whole download
REDIRECTS = (301, 302, 303, 307, 308)


def picture_source(settings: ServerSettings) -> Callable[[Any], Picture]:
    r"""Return a function that opens the picture that a message names.

    Example:
        >>> open_source = picture_source(ServerSettings(model="demo"))
        >>> open_source("data:image/png;base64,iVBORw0KGgo=")
        b'\x89PNG\r\n\x1a\n'
        >>> open_source("https://example.org/cat.png")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: This server downloads nothing from 'example.org'. Send the picture as a
        'data:' address, or start the server with --picture-host.
    """

    def open_source(source: object) -> Picture:
        if not isinstance(source, str):
            raise InputError("A picture of a message has no address.", "Give a 'data:' address.")
        parts = _split(source)
        if parts.scheme == "data":
            return data_bytes(source)
        if parts.scheme in ("http", "https"):
            return _download(parts, settings.picture_hosts)
        return _file(parts, source, settings)

    return open_source


def bounded(open_source: Callable[[Any], Picture], most: int) -> Callable[[Any], Picture]:
    """Limit the pixels that all pictures of one request have together, because memory grows with them.

    Args:
        open_source: Opens one picture.
        most: The largest number of pixels.

    Returns:
        A function like `open_source`. It raises InputError before it decodes a picture beyond the limit.

    Example:
        >>> import numpy as np
        >>> open_counted = bounded(lambda source: source, most=100)
        >>> open_counted(np.zeros((8, 10, 3), np.uint8)).shape  # 80 pixels
        (8, 10, 3)
        >>> open_counted(np.zeros((8, 10, 3), np.uint8))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: The pictures of the request have more than 100 pixels in all. Scale them
        down, or send fewer.
    """
    left = most

    def open_counted(source: object) -> Picture:
        nonlocal left
        picture = open_source(source)
        left -= count_pixels(picture)
        if left < 0:
            raise InputError(
                f"The pictures of the request have more than {most} pixels in all.",
                "Scale them down, or send fewer.",
            )
        return picture

    return open_counted


def check_videos(videos: Sequence[Video], most: int) -> None:
    """Limit the pixels of all frames of a request's videos, by their headers.

    Raises:
        InputError: If they are more than `most`.

    Example:
        >>> import numpy as np
        >>> check_videos([Video(np.zeros((4, 8, 10, 3), np.uint8))], most=300)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: The videos of the request have 320 pixels in all; up to 300 are read.
        Send fewer or smaller frames.
    """
    total = sum(map(count_video_pixels, videos))
    if total > most:
        raise InputError(
            f"The videos of the request have {total} pixels in all; up to {most} are read.",
            "Send fewer or smaller frames.",
        )


def _split(source: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(source)
    except ValueError as error:
        raise InputError(f"'{shortened(source)}' is no address.", "Give a 'data:' address.") from error


def _file(parts: urllib.parse.SplitResult, source: str, settings: ServerSettings) -> Picture:
    folder = settings.picture_folder
    if folder is None:
        raise InputError(
            f"This server opens no files: '{shortened(source)}'.",
            "Send the picture as a 'data:' address, or start the server with --picture-folder.",
        )
    if parts.scheme not in ("", "file") or parts.netloc:
        raise InputError(f"'{shortened(source)}' is no file.", "Name a file of the server's picture folder.")
    try:
        path = (folder / urllib.parse.unquote(parts.path) if parts.scheme else folder / source).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"'{shortened(source)}' is no path of a file.", "Correct the path.") from error
    if not path.is_relative_to(folder.resolve()):
        raise InputError(
            f"The picture '{shortened(source)}' lies outside the server's picture folder.", "Name a file in it."
        )
    return path


def _download(parts: urllib.parse.SplitResult, hosts: tuple[str, ...]) -> bytes:
    """The content of an address of an allowed host; redirects are not followed."""
    try:
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError("The address of a picture has no port number.", "Correct it.") from error
    if host not in hosts or parts.username is not None:
        raise InputError(
            f"This server downloads nothing from '{shortened(host or '')}'.",
            "Send the picture as a 'data:' address, or start the server with --picture-host.",
        )
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=SECONDS, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status in REDIRECTS:
            raise InputError(f"'{host}' sends the picture's address on to another one.", "Give that one.")
        if response.status != http.client.OK:
            raise InputError(f"'{host}' answers with status {response.status}.", "Correct the picture's address.")
        content = _content(response)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f"A picture could not be downloaded from '{host}': {error}.", "Send it as 'data:'.") from error
    finally:
        connection.close()
    if len(content) > MAX_DOWNLOAD:
        raise InputError(f"A picture has more than {MAX_DOWNLOAD >> 20} MiB.", "Scale it down first.")
    return content


def _content(response: http.client.HTTPResponse) -> bytes:
    """Read a response, up to one byte more than a picture may have.

    Raises:
        TimeoutError: If a host sends it too slowly.
    """
    parts: list[bytes] = []
    size, end = 0, time.monotonic() + DOWNLOAD_SECONDS
    while size <= MAX_DOWNLOAD and (part := response.read1(1 << 16)):
        parts.append(part)
        size += len(part)
        if time.monotonic() > end:
            raise TimeoutError(f"it took more than {DOWNLOAD_SECONDS} seconds")
    return b"".join(parts)
