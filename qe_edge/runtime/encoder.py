"""Engines of vision encoders alone: pictures in, features out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qe_edge.models.family import Encoded, ModelFamily, Sample
from qe_edge.models.vision_encoder import MAX_PICTURES
from qe_edge.runtime.backends import check_runnable, open_sessions
from qe_edge.runtime.engine import family_of_engines
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.generation import check_finite
from qe_edge.runtime.manifest import EncoderManifest, read_encoder_manifest
from qe_edge.runtime.sessions import OrtSession, Session
from qe_edge.system.errors import InputError


class EncoderEngine:
    """A vision encoder in ONNX Runtime or TensorRT; `load` opens a folder.

    Attributes:
        manifest: The folder's manifest.
        family: The model's family.
        processor: Image processor.

    Example:
        engine = EncoderEngine.load("engines")
        features = engine.features(engine.encode([Sample("a.png", "")]))
    """

    def __init__(
        self,
        manifest: EncoderManifest,
        family: ModelFamily,
        processor: Any,  # noqa: ANN401 - each family has its own processor type
        session: Session,
    ) -> None:
        self.manifest = manifest
        self.family = family
        self.processor = processor
        self._session = session

    @classmethod
    def load(
        cls, folder: str | Path, *, threads: int | None = None, plugin_library: Path | None = None
    ) -> EncoderEngine:
        """Open an ONNX folder (`qe-edge export`) or an engine folder (`qe-edge build`) of a vision encoder.

        Args:
            folder: The folder.
            threads: For ONNX Runtime: number of threads, None for all cores.
            plugin_library: For engines with the plugin: its library, None for the one that is found.

        Raises:
            ArtifactError: If the folder is missing or damaged, or holds a model that writes text.
            TargetError: If this machine cannot run its engine.
        """
        folder = Path(folder)
        info = read_engine_info(folder)
        check_runnable(folder, plugin_library)
        manifest = read_encoder_manifest(folder)
        if info is not None:
            info.check_belongs(manifest, folder)
        family = family_of_engines(folder, manifest.model_type)
        entry = manifest.graphs["visual"]
        session: Session
        if info is None or info.backend == "onnxruntime":
            session = OrtSession(folder, entry, accuracy_level=0, threads=threads)
        else:
            session = open_sessions(folder, {"visual": entry}, info, None, plugin_library)["visual"]
        return cls(manifest, family, family.load_processor(str(folder)), session)

    def encode(self, samples: Sequence[Sample]) -> Encoded:
        """Pixels of a batch of pictures.

        Raises:
            InputError: If there is no picture, or one that cannot be read.
        """
        if not samples:
            raise InputError("There is no picture to encode.", "Pass at least one.")
        return self.family.encode(self.processor, samples)

    def features(self, encoded: Encoded) -> np.ndarray:
        """Features float32 `[pictures, tokens, width]`: transformers' `last_hidden_state`.

        Raises:
            NumericalError: If they are not finite.
        """
        (feeds,) = self.family.visual_feeds(encoded)
        pixels = feeds["pixel_values"]
        parts = [pixels[start : start + MAX_PICTURES] for start in range(0, len(pixels), MAX_PICTURES)]
        outputs = [next(iter(self._session.run({"pixel_values": part}).values())) for part in parts]
        features = np.concatenate([np.asarray(output, np.float32) for output in outputs])
        check_finite(features, "The features of the engine")
        return features
