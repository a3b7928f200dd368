"""From a user's question to the inputs of the language model. Every picture is encoded once."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np

from qe_edge.models.family import Encoded, Sample
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.picture_memory import PictureMemory, VideoMemory, joint_key

PICTURE_BYTES = 256 << 20  # of pictures that are remembered


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready to be read.

    Attributes:
        encoded: A batch of one.
        positions: As `family.position_ids` gives them.
        numbers: The graph's mask on its tokens, int64 `[1, tokens]`. Tokens with the same number above 1 see each other
            in both directions.
        pictures: A key for the content of each picture or video; one for all of them where they do not stand alone.
    """

    encoded: Encoded
    positions: np.ndarray
    numbers: np.ndarray
    pictures: tuple[bytes, ...]

    @property
    def ids(self) -> np.ndarray:
        """Tokens int64 `[tokens]`."""
        ids: np.ndarray = self.encoded.input_ids[0]
        return ids


class PromptReader:
    """Encodes prompts and pictures; several threads may use it.

    Prompts are encoded one after the other: tokenizers may be changed while they work. So are pictures, whose encoder
    takes most memory of all.

    Args:
        engine: The model.
        device: Held while the engine computes.
        picture_bytes: Memory for pictures that may come again.

    Example:
        >>> from contextlib import nullcontext  # doctest: +SKIP
        >>> reader = PromptReader(VisionLanguageEngine.load("out/demo/engines/cpu"), nullcontext())  # doctest: +SKIP
        >>> reader.encode(Sample("picture.png", "what is it?")).ids  # doctest: +SKIP
    """

    def __init__(
        self,
        engine: VisionLanguageEngine,
        device: AbstractContextManager[object],
        picture_bytes: int = PICTURE_BYTES,
    ) -> None:
        self._engine, self._device = engine, device
        self._processor = engine.processor
        self._memory: PictureMemory | None = None
        if engine.manifest.image_token_id is not None:
            self._memory = PictureMemory(engine.processor.image_processor, picture_bytes)
            self._processor = replace(engine.processor, image_processor=self._memory)
            videos = getattr(engine.processor, "video_processor", None)
            if videos is not None:  # their tokens are counted before their frames are read
                most = min(videos.max_tokens or engine.max_context, engine.max_context)
                bounded = replace(videos, max_tokens=most)
                self._processor = replace(self._processor, video_processor=VideoMemory(bounded, self._memory))
        self._encoding, self._seeing = threading.Lock(), threading.Lock()

    @property
    def remembered_bytes(self) -> int:
        """Memory of the pictures that are remembered."""
        return 0 if self._memory is None else self._memory.nbytes

    def encode(self, sample: Sample) -> Prompt:
        """Open and prepare the pictures, and tokenize.

        Raises:
            InputError: If a picture or the conversation cannot be read, or the prompt is beyond the context.
        """
        family = self._engine.family
        with self._encoding:
            if self._memory is not None:
                self._memory.used.clear()
            encoded = family.encode(self._processor, [sample])
            keys = () if self._memory is None else tuple(self._memory.used)
        if not family.pictures_stand_alone and len(keys) > 1:
            keys = (joint_key(keys),)
        return Prompt(encoded, family.position_ids(encoded), family.graph_mask(encoded), keys)

    def features(self, prompt: Prompt, sample: Sample, first: int = 0) -> tuple[list[np.ndarray], float, float]:
        """Image features of a prompt's pictures.

        Args:
            prompt: The prompt.
            sample: The sample that it was made of.
            first: Number of the first picture that is needed.

        Returns:
            Features float32 `[tokens, width]` of every picture; seconds in the visual encoder and in the merger.
        """
        found: list[np.ndarray] = []
        spent = np.zeros(2)
        if self._memory is None or first >= len(prompt.pictures):
            return found, 0.0, 0.0
        stands_alone = self._engine.family.pictures_stand_alone
        samples = [Sample(shown, "?") for shown in sample.media] if stands_alone else [sample]
        with self._seeing:
            for key, asked in list(zip(prompt.pictures, samples, strict=True))[first:]:
                features = self._memory.features(key)
                if features is None:
                    features, *seconds = self._see(asked)
                    spent += seconds
                    self._memory.remember(key, features, instead_of_pixels=stands_alone)
                found.append(features)
        return found, float(spent[0]), float(spent[1])

    def _see(self, sample: Sample) -> tuple[np.ndarray, float, float]:
        with self._encoding:
            encoded = self._engine.family.encode(self._processor, [sample])
        with self._device:
            start = time.perf_counter()
            hidden = self._engine.visual(encoded)
            middle = time.perf_counter()
            features = self._engine.merger(hidden)
            return features, middle - start, time.perf_counter() - middle
