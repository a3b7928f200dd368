"""Limits of engines: read from profiles, changed, and refused in a sentence."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from qe_edge.errors import InputError, QENotice
from qe_edge.models.family import Encoded
from qe_edge.runtime.limits import (
    EngineLimits,
    check_limits,
    describe_limits,
    limits_of,
    warn_of_pictures,
    with_limits,
)
from qe_edge.runtime.manifest import Manifest, read_manifest
from tests.conftest import Exported


@pytest.fixture
def manifest(exported: Exported) -> Manifest:
    return read_manifest(exported.onnx)


def test_a_camera_frame_fits_by_default(manifest: Manifest) -> None:
    limits = limits_of(manifest)
    assert limits.patches is not None
    assert limits.patches >= 138 * 78  # 1920 x 1080 in whole merged patches of 28 pixels


def test_other_limits_change_every_profile(manifest: Manifest) -> None:
    changed = with_limits(manifest, EngineLimits(batch=2, context=90, prompt=80, patches=101))
    assert limits_of(changed) == EngineLimits(2, 90, 80, patches=104)  # whole groups of four
    assert changed.graphs["merger"].profiles["default"]["hidden_states"][2][0] == 26
    assert "104 patches" in describe_limits(changed)
    Manifest.model_validate(changed.model_dump())
    for graph in changed.graphs.values():
        for profile in graph.profiles.values():
            for low, typical, high in profile.values():
                assert all(a <= b <= c for a, b, c in zip(low, typical, high, strict=True))


@pytest.mark.parametrize(
    ("wanted", "words", "remedy"),
    [
        (EngineLimits(tiles=3), "has no tiles", "--max-tiles"),
        (EngineLimits(context=1 << 20), "attends to", "--max-context"),
        (EngineLimits(context=50, prompt=60), "does not fit into a context of 50", "--max-context"),
        (EngineLimits(context=1), "no room", "--max-context"),
    ],
)
def test_limits_that_make_no_sense(manifest: Manifest, wanted: EngineLimits, words: str, remedy: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        with_limits(manifest, wanted)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("limits", "words", "remedy"),
    [
        (EngineLimits(batch=1), "2 questions at a time", "--max-batch 2"),
        (EngineLimits(patches=7), "pictures of 8 patches", "--max-patches 8"),
        (EngineLimits(prompt=4), "a prompt of 5 tokens", "--max-prompt 5"),
        (EngineLimits(context=7), "5 tokens of prompt and 3 of answer", "--max-context 8"),
    ],
)
def test_a_batch_that_is_too_large(limits: EngineLimits, words: str, remedy: str) -> None:
    ids = np.zeros((2, 5), np.int64)
    encoded = Encoded(ids, ids, ids.astype(bool), ids.astype(bool), {"pixel_values": np.zeros((8, 3))})
    check_limits(EngineLimits(2, 8, 5, 8), encoded, 3)
    with pytest.raises(InputError, match=words) as caught:
        check_limits(limits, encoded, 3)
    assert remedy in caught.value.remedy


def test_pictures_that_the_model_makes_and_the_engine_refuses(manifest: Manifest) -> None:
    pictures = SimpleNamespace(size={"longest_edge": 14 * 14 * 20000}, patch_size=14)
    with pytest.warns(QENotice, match=r"up to 20000 patches.*--max-patches"):
        warn_of_pictures(manifest, pictures)
