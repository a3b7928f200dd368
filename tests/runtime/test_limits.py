"""Limits of engines: read from profiles, changed, and refused in a sentence."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from qe_edge.models.family import Encoded
from qe_edge.runtime.engine import family_of_engines
from qe_edge.runtime.limits import (
    EngineLimits,
    check_limits,
    describe_limits,
    limits_of,
    with_limits,
)
from qe_edge.runtime.manifest import Manifest, read_manifest
from qe_edge.runtime.picture_limits import describe_pictures, tell_limits, warn_of_pictures
from qe_edge.system.errors import InputError, QENotice
from tests.conftest import Exported

GRIDS = np.array([[1, 2, 2], [1, 2, 4]])  # of two pictures: 4 and 8 patches


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
        (EngineLimits(patches=7), "a picture of 8 patches", "--max-patches 8"),
        (EngineLimits(prompt=4), "a prompt of 5 tokens", "--max-prompt 5"),
        (EngineLimits(context=7), "5 tokens of prompt and 3 of answer", "--max-context 8"),
    ],
)
def test_a_batch_that_is_too_large(limits: EngineLimits, words: str, remedy: str) -> None:
    ids = np.zeros((2, 5), np.int64)
    encoded = Encoded(
        ids, ids, ids.astype(bool), ids.astype(bool), {"pixel_values": np.zeros((12, 3)), "image_grid_thw": GRIDS}
    )
    check_limits(EngineLimits(2, 8, 5, 8), encoded, 3)
    with pytest.raises(InputError, match=words) as caught:
        check_limits(limits, encoded, 3)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("sizes", ["grids", "target_sizes"])
def test_tiles_of_different_sizes_are_counted_by_their_sizes(sizes: str) -> None:
    """LFM2-VL and MiniCPM-V 4.6 have the patches of all tiles in one row."""
    ids = np.zeros((1, 5), np.int64)
    pixels = {"pixel_values": np.zeros((90, 3)), sizes: np.full((3, 2), 4)}
    encoded = Encoded(ids, ids, ids.astype(bool), ids.astype(bool), pixels)
    check_limits(EngineLimits(tiles=3), encoded, 1)
    with pytest.raises(InputError, match="pictures of 3 tiles: it was built for 2"):
        check_limits(EngineLimits(tiles=2), encoded, 1)


@pytest.mark.parametrize(
    ("pictures", "most"),
    [
        (SimpleNamespace(max_tiles=12, do_image_splitting=True, size={"longest_edge": None}), 12 + 1),
        (SimpleNamespace(max_tiles=12, do_image_splitting=False), 1),
        (SimpleNamespace(max_slice_nums=9), 9 + 1),
        (SimpleNamespace(max_patches=6), 6 + 1),
    ],
)
def test_tiles_that_an_image_processor_makes(manifest: Manifest, pictures: SimpleNamespace, most: int) -> None:
    """Of LFM2-VL, MiniCPM-V 4.6 and InternVL, and their smaller copy of the whole picture."""
    visual = manifest.graphs["visual"]
    inputs = tuple(spec for spec in visual.inputs if spec.name != "position_ids")
    profiles = {"default": {"pixel_values": ((1, 3), (1, 3), (most - 1, 3))}}
    tiled = visual.model_copy(update={"inputs": inputs, "profiles": profiles})
    small = manifest.model_copy(update={"graphs": {**manifest.graphs, "visual": tiled}})
    if most > 1:
        with pytest.warns(QENotice, match=f"up to {most} tiles, these engines take {most - 1}"):
            warn_of_pictures(small, pictures)
    profiles["default"]["pixel_values"] = ((1, 3), (1, 3), (most, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_pictures(small, pictures)


def test_pictures_that_the_model_makes_and_the_engine_refuses(manifest: Manifest) -> None:
    pictures = SimpleNamespace(size={"longest_edge": 14 * 14 * 20000}, patch_size=14)
    with pytest.warns(QENotice, match=r"up to 20000 patches.*--max-patches"):
        warn_of_pictures(manifest, pictures)


@pytest.mark.parametrize(
    ("limits", "line"),
    [
        (EngineLimits(), "A picture of 1920 x 1080 fits."),
        (EngineLimits(patches=5000), "A picture of 1280 x 720 fits, 1920 x 1080 does not fit."),
        (EngineLimits(prompt=100), "A picture of 640 x 480 does not fit."),
        (EngineLimits(context=420, prompt=420), "A picture of 640 x 480 does not fit."),  # 64 are for the answer
    ],
)
def test_camera_pictures_are_named(exported: Exported, manifest: Manifest, limits: EngineLimits, line: str) -> None:
    family = family_of_engines(exported.onnx, manifest.model_type)
    processor = family.load_processor(str(exported.onnx))
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 14 * 14 * 16384}
    roomy = family.config.get_text_config()
    roomy.max_position_embeddings = 4096
    manifest = with_limits(manifest.model_copy(update={"max_context": 4096}), EngineLimits(context=4096, prompt=4096))
    assert describe_pictures(with_limits(manifest, limits), family, processor) == line


def test_what_is_said_of_a_folder(exported: Exported, manifest: Manifest) -> None:
    lines: list[str] = []
    tell_limits(exported.onnx, manifest, lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(describe_limits(manifest))
    assert " x " in lines[0]
    lines.clear()
    tell_limits(exported.onnx, manifest.model_copy(update={"image_token_id": None}), lines.append)
    assert lines == [describe_limits(manifest)]
