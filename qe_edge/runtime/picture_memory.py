"""Remembers prepared and encoded pictures up to a number of bytes, so that they need not be made again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

SMALL = 4096  # bytes of an array that says how a picture is cut, not what is in it


@dataclass
class _Entry:
    prepared: dict[str, Any]
    features: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        arrays = [*self.prepared.values(), *([] if self.features is None else [self.features])]
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray) and any(array.strides))


class PictureMemory:
    """Stands in for an image processor and remembers its results; the oldest pictures are forgotten first.

    Args:
        image_processor: The image processor of a model.
        capacity: Bytes that may be kept: prepared pixels until a picture is encoded, then its features.

    Attributes:
        used: Keys of the pictures that were prepared since it was last emptied.

    Example:
        >>> from PIL import Image
        >>> memory = PictureMemory(lambda images: {"pixel_values": np.asarray(images[0])}, capacity=1 << 20)
        >>> picture = Image.new("RGB", (8, 8))
        >>> memory(images=[picture]) is memory(images=[picture]), memory.nbytes  # prepared once
        (True, 192)
    """

    def __init__(self, image_processor: Any, capacity: int) -> None:  # noqa: ANN401 - they share no typed base
        self._image_processor = image_processor
        self._capacity = capacity
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._total = 0
        self._lock = threading.Lock()
        self.used: list[bytes] = []

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the processor's own
        return getattr(self._image_processor, name)

    def __call__(self, *, images: list[Any], **options: Any) -> dict[str, Any]:  # noqa: ANN401 - the processor's own
        """The image processor's arrays for 8-bit RGB pictures, one or a list of lists of them."""
        return self.prepared(self._image_processor, images, options)

    def prepared(self, processor: Any, images: list[Any], options: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        """What a processor makes of pictures, or of the frames of a video."""
        video = [] if processor is self._image_processor else [("video", True)]
        digest = hashlib.sha256(repr(sorted([*options.items(), *video])).encode())
        _add_pictures(digest, images)
        key = digest.digest()
        self.used.append(key)
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.prepared:
                self._entries.move_to_end(key)
                return entry.prepared
        prepared = dict(processor(images=images, **options))
        self._keep(key, _Entry(prepared))
        return prepared

    def features(self, key: bytes) -> np.ndarray | None:
        """Features `[tokens, width]` of a picture, or of several with a joint key; None if they are not known."""
        with self._lock:
            entry = self._entries.get(key)
            return None if entry is None else entry.features

    def remember(self, key: bytes, features: np.ndarray, *, instead_of_pixels: bool) -> None:
        """Keep features.

        Args:
            key: Of a picture, or a joint key.
            features: `[tokens, width]`.
            instead_of_pixels: Whether only the shapes of the prepared arrays are needed from now on.
        """
        with self._lock:
            entry = self._entries.get(key)
        if entry is None and instead_of_pixels:
            return  # forgotten in the meantime
        prepared = {} if entry is None else entry.prepared
        if instead_of_pixels:
            prepared = {name: _hollow(value) for name, value in prepared.items()}
        self._keep(key, _Entry(prepared, features))

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._total

    def _keep(self, key: bytes, entry: _Entry) -> None:
        with self._lock:
            earlier = self._entries.pop(key, None)
            self._entries[key] = entry
            self._total += entry.nbytes - (0 if earlier is None else earlier.nbytes)
            while self._total > self._capacity:
                _, oldest = self._entries.popitem(last=False)
                self._total -= oldest.nbytes


class VideoMemory:
    """Stands in for a video processor, and keeps its results in the memory of pictures.

    Args:
        video_processor: Prepares the frames of a video.
        memory: Where results are kept.

    Example:
        >>> from PIL import Image
        >>> memory = PictureMemory(lambda images: {}, capacity=1 << 20)
        >>> videos = VideoMemory(lambda images: {"frames": np.stack([np.asarray(image) for image in images])}, memory)
        >>> frames = [Image.new("RGB", (8, 8))] * 2
        >>> videos(images=frames) is videos(images=frames), memory.nbytes, len(memory.used)
        (True, 384, 2)
    """

    def __init__(self, video_processor: Any, memory: PictureMemory) -> None:  # noqa: ANN401 - as above
        self._video_processor, self._memory = video_processor, memory

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the processor's own
        return getattr(self._video_processor, name)

    def __call__(self, *, images: list[Any]) -> dict[str, Any]:
        """The video processor's arrays for 8-bit RGB frames."""
        return self._memory.prepared(self._video_processor, images, {})


def _add_pictures(digest: Any, images: Any) -> None:  # noqa: ANN401 - hashlib names no type for users
    if isinstance(images, list | tuple):
        digest.update(f"[{len(images)}]".encode())
        for image in images:
            _add_pictures(digest, image)
        return
    digest.update(f"{images.size}".encode())
    digest.update(images.tobytes())


def joint_key(keys: tuple[bytes, ...]) -> bytes:
    """One key for several pictures together.

    Example:
        >>> joint_key((b"first", b"second")) == joint_key((b"second", b"first"))
        False
    """
    return hashlib.sha256(b"".join(keys)).digest()


def _hollow(value: Any) -> Any:  # noqa: ANN401 - arrays and lists of numbers
    """An array of the same shape that takes no memory; small ones, those of sizes and other values stay as they are."""
    if not isinstance(value, np.ndarray) or value.nbytes <= SMALL or value.dtype.kind == "i":
        return value
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)
