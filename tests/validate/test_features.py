"""Cosines and the linear probe on a small vision encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.system.errors import CalibrationError
from qe_edge.validate.features import BATCH, Features, LinearProbe, extract_features, mean_cosine
from tests.small_models import PATCH, PICTURE, write_small_dinov2

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(write_small_dinov2(tmp_path_factory.mktemp("dinov2") / "model")))


def painted(count: int, seed: int) -> tuple[list[Sample], list[str]]:
    """Pictures of one colour and noise, with the colour's name."""
    rng = np.random.default_rng(seed)
    labels = [list(COLORS)[number % 2] for number in range(count)]
    noise = rng.integers(-25, 25, (count, 40, 40, 3))
    pixels = [(np.array(COLORS[label]) + part).astype(np.uint8) for label, part in zip(labels, noise, strict=True)]
    return [Sample(Image.fromarray(part), "") for part in pixels], labels


def test_features_are_those_of_the_model(encoder: LoadedModel) -> None:
    samples, _ = painted(BATCH + 3, 0)
    features = extract_features(encoder, samples)
    assert features.patches.shape == (BATCH + 3, (PICTURE // PATCH) ** 2, 32)
    encoded = encoder.family.encode(encoder.processor, samples[-1:])
    with torch.no_grad():
        alone = encoder.model(**encoder.family.torch_inputs(encoded)).last_hidden_state[0]
    assert torch.allclose(features.picture[-1], alone[0], atol=1e-5)
    assert torch.allclose(features.patches[-1], alone[1:], atol=1e-5)
    with pytest.raises(CalibrationError, match="no picture"):
        extract_features(encoder, [])


def test_cosine() -> None:
    one = Features(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]]]))
    two = Features(torch.tensor([[0.0, 5.0], [2.0, 2.0]]), torch.tensor([[[0.0, 1.0]], [[-1.0, 0.0]]]))
    assert mean_cosine(one, two) == pytest.approx({"cosine_cls": 0.5, "cosine_patches": 0.0})
    assert mean_cosine(one, one) == pytest.approx({"cosine_cls": 1, "cosine_patches": 1})


def test_the_probe_reads_what_the_features_hold(encoder: LoadedModel) -> None:
    (training, known), (tested, labels) = painted(40, 1), painted(20, 2)
    probe = LinearProbe(extract_features(encoder, training), {"color": known})
    features = extract_features(encoder, tested)
    assert probe.accuracy(features, {"color": labels})["color"] >= 0.95
    exchanged = labels[1:] + labels[:1]
    assert probe.accuracy(features, {"color": exchanged})["color"] <= 0.05
    # features in which every picture is the same tell nothing
    flat = Features(features.picture.mean(0, keepdim=True).expand_as(features.picture), features.patches)
    assert probe.accuracy(flat, {"color": labels})["color"] == pytest.approx(0.5)
