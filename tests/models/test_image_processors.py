"""preprocessor_config.json: bounded sizes, and the sizes of the vision encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qe_edge.demo import model_path
from qe_edge.models.configuration import load_family
from qe_edge.system.errors import ModelError
from tests.models.model_files import copy_files, edit
from tests.small_models import write_small_dinov2


def _refused(folder: Path, values: dict[str, Any]) -> ModelError:
    edit(folder / "preprocessor_config.json", lambda table: table.update(values))
    with pytest.raises(ModelError) as caught:
        load_family(str(folder)).load_processor(str(folder))
    assert "preprocessor_config.json" in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"patch_size": 16}, "patch_size is 16; the vision encoder of config.json has 14"),
        ({"merge_size": 4}, "merge_size is 4; the vision encoder of config.json has 2"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"merge_size": 5_000_000}, "Key 'merge_size' of"),
        ({"size": {"shortest_edge": 10, "longest_edge": 10**11}}, "Key 'size.longest_edge' of"),
        ({"max_pixels": 10**10}, "Key 'size.longest_edge' of"),
        ({"min_pixels": 50_000, "max_pixels": 40_000}, "smallest number of pixels is above the largest"),
        ({"image_mean": [0.5, 0.5]}, "Key 'image_mean' of"),
        ({"image_std": [0.2, 0.0, 0.2]}, "Key 'image_std' of .* greater than or equal to 0.0001"),
        ({"image_std": None}, "Key 'image_std' of"),
        ({"rescale_factor": "0.0039"}, "Key 'rescale_factor' of"),
        ({"resample": 17}, "Key 'resample' of"),
        ({"do_resize": "no"}, "Key 'do_resize' of"),
        ({"size": [1, 2, 3]}, "Key 'size.shortest_edge' of"),
        ({"preprocess": 1}, "Key 'preprocess' of .* is no setting"),
    ],
)
def test_patches_that_the_model_cannot_take(tmp_path: Path, values: dict[str, Any], complaint: str) -> None:
    error = _refused(copy_files(model_path(), tmp_path / "model"), values)
    _matches(error, complaint)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"max_patches": 100_000}, "Key 'max_patches' of"),
        ({"min_patches": 5}, "min_patches is above max_patches"),
        (
            {"size": {"height": 28, "width": 56}},
            r"size is \[28, 56\]; the vision encoder of config.json has \[56, 56\]",
        ),
        ({"size": {"height": 10**6, "width": 56}}, "Key 'size.height' of"),
    ],
)
def test_tiles_that_the_model_cannot_take(
    tiny_internvl: Path, tmp_path: Path, values: dict[str, Any], complaint: str
) -> None:
    _matches(_refused(copy_files(tiny_internvl, tmp_path / "model"), values), complaint)


def test_sizes_of_a_vision_encoder_are_bounded(tmp_path: Path) -> None:
    folder = write_small_dinov2(tmp_path / "model")
    _matches(_refused(folder, {"size": {"height": 50_000, "width": 56}}), "Key 'size.height' of")
    values = {"size": {"height": 56, "width": 56}, "do_center_crop": True, "crop_size": {"height": 9999, "width": 56}}
    _matches(_refused(folder, values), "Key 'crop_size.height' of")


def test_a_combined_file_counts_first(tmp_path: Path) -> None:
    folder = copy_files(model_path(), tmp_path / "model")
    values = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {**values, "patch_size": 99}}))
    with pytest.raises(ModelError, match=r"Key 'patch_size' of '.*/processor_config.json'"):
        load_family(str(folder)).load_processor(str(folder))
    (folder / "processor_config.json").write_text('{"image_processor": [1]}')
    with pytest.raises(ModelError, match=r"Key 'image_processor' of .* is no table"):
        load_family(str(folder)).load_processor(str(folder))


def _matches(error: ModelError, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        raise error
