"""What prepares a model's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VisionLanguageProcessor:
    """Tokenizer and image processor, loaded one by one: transformers' combined classes need torchvision for videos.

    Attributes:
        tokenizer: Of transformers.
        image_processor: Of transformers.
        video_processor: Prepares videos; None where the model takes none.
    """

    tokenizer: Any
    image_processor: Any
    video_processor: Any = None
