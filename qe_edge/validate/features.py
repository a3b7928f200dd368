"""Distance of a vision encoder's features from the original's, and the accuracy of a linear probe on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel
from qe_edge.runtime.encoder import EncoderEngine
from qe_edge.system.errors import CalibrationError, NumericalError
from qe_edge.validate.metrics import REMEDY

BATCH = 16
MAX_STEPS = 2000  # of the probe's solver


@dataclass(frozen=True)
class Features:
    """Outputs of a vision encoder.

    Attributes:
        picture: Features of the class token, or the mean over the patches where there is none, float32
            `[pictures, features]`.
        patches: Features of the patches, float32 `[pictures, patches, features]`.
    """

    picture: Tensor
    patches: Tensor


def extract_features(loaded: LoadedModel | EncoderEngine, samples: Sequence[Sample]) -> Features:
    """Compute the features of pictures in PyTorch or in an engine. The image processor must give all one size.

    Raises:
        InputError: If a picture cannot be read.
        CalibrationError: If there is no picture.
        NumericalError: If features are not finite.

    Example:
        >>> from qe_edge.calibration.sources import load_samples  # doctest: +SKIP
        >>> from qe_edge.models.loading import load_model  # doctest: +SKIP
        >>> loaded = load_model("facebook/dinov2-small")  # doctest: +SKIP
        >>> features = extract_features(loaded, load_samples("pictures.jsonl", 16, seed=0))  # doctest: +SKIP
        >>> features.picture.shape, features.patches.shape  # doctest: +SKIP
    """
    if not samples:
        raise CalibrationError("There is no picture to measure on.", "Give lines that name pictures.")
    outputs = []
    for start in range(0, len(samples), BATCH):
        encoded = loaded.family.encode(loaded.processor, samples[start : start + BATCH])
        if isinstance(loaded, EncoderEngine):
            outputs.append(torch.from_numpy(loaded.features(encoded)))
            continue
        with torch.no_grad():
            outputs.append(loaded.model(**loaded.family.torch_inputs(encoded)).last_hidden_state.float())
    tokens = torch.cat(outputs)
    if not tokens.isfinite().all():
        raise NumericalError("The features of a model that is measured hold NaN or infinity.", REMEDY)
    if not loaded.family.class_token:
        return Features(tokens.mean(1), tokens)
    return Features(tokens[:, 0], tokens[:, 1:])


def mean_cosine(original: Features, other: Features) -> dict[str, float]:
    """Mean cosine between both models' features, of class tokens and of patches; 1 is the same direction.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> picture, patches = torch.randn(4, 64), torch.randn(4, 16, 64)
        >>> found = mean_cosine(Features(picture, patches), Features(picture + 0.1 * torch.randn(4, 64), patches))
        >>> {name: round(value, 3) for name, value in found.items()}
        {'cosine_cls': 0.994, 'cosine_patches': 1.0}
    """
    return {
        "cosine_cls": _cosine(original.picture, other.picture),
        "cosine_patches": _cosine(original.patches, other.patches),
    }


class LinearProbe:
    """Logistic regressions on the class token's features of the original model, one for each label.

    Args:
        features: Features of the pictures that it learns from.
        labels: The label of every picture, for each name of a label.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> labels = {"color": ["red"] * 20 + ["blue"] * 20}
        >>> centers = torch.tensor([[3.0, 0.0]] * 20 + [[0.0, 3.0]] * 20)
        >>> known, other = (Features(centers + torch.randn(40, 2), torch.zeros(40, 1, 2)) for _ in range(2))
        >>> LinearProbe(known, labels).accuracy(other, labels)
        {'color': 0.975}
    """

    def __init__(self, features: Features, labels: Mapping[str, Sequence[str]]) -> None:
        inputs = features.picture.numpy()
        self._probes: dict[str, Any] = {
            name: make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_STEPS)).fit(inputs, list(known))
            for name, known in labels.items()
        }

    def accuracy(self, features: Features, labels: Mapping[str, Sequence[str]]) -> dict[str, float]:
        """Share of pictures, 0 to 1, whose label the probe predicts rightly from a model's features."""
        inputs = features.picture.numpy()
        return {
            name: float(np.mean(probe.predict(inputs) == np.asarray(labels[name])))
            for name, probe in self._probes.items()
        }


def _cosine(wanted: Tensor, found: Tensor) -> float:
    return float(functional.cosine_similarity(wanted.double(), found.double(), dim=-1).mean())
