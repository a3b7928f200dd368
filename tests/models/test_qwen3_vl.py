"""Qwen3-VL: learnt positions, features for the first decoder layers, and what has to hold for every family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.system.errors import ModelError
from tests.models.families import FamilyChecks
from tests.models.qwen_models import CONFIGS, write_qwen
from tests.models.video_checks import VideoChecks


class TestQwen3VL(VideoChecks, FamilyChecks):
    processor_class = Qwen3VLProcessor
    video_processor = "qwen3_vl"
    linears = {"visual": 4 * 4, "merger": 3 * 2, "language": 3 * 7}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_qwen(tmp_path_factory.mktemp("model") / "qwen3_vl", "qwen3_vl")

    @pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 8), (10, 26), (40, 6)])
    def test_learnt_positions_are_those_of_transformers(self, original: LoadedModel, height: int, width: int) -> None:
        feeds = original.family.frame_feeds(height, width)  # type: ignore[attr-defined] # of this family
        points, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, height, width]]), 8, align_corners=True, spatial_merge_size=2
        )
        assert np.array_equal(feeds["grid_points"].reshape(-1, 4), points.numpy())
        assert np.array_equal(feeds["grid_weights"].reshape(-1, 4), weights.numpy())

    def test_features_reach_the_first_layers(self, original: LoadedModel) -> None:
        """Blocks are in the order in which data flows, and chains end where features are added."""
        blocks = original.family.blocks(original.model)
        names = [block.name.rpartition("visual.")[2] for block in blocks if "visual" in block.name]
        assert names == [
            "blocks.0", "deepstack_merger_list.0", "blocks.1", "blocks.2", "deepstack_merger_list.1", "blocks.3",
            "merger",
        ]  # fmt: skip
        assert [block.ends_chain for block in blocks if block.group == "language"] == [True, True, False]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"deepstack_visual_indexes": [0, 4]}, "deepstack_visual_indexes"),
        ({"deepstack_visual_indexes": [1, 1]}, "deepstack_visual_indexes"),
        ({"num_position_embeddings": 65}, "no square number"),
        ({"out_hidden_size": 128}, "out_hidden_size 128 is not text_config.hidden_size 96"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, object], problem: str, tmp_path: Path) -> None:
    folder = write_qwen(tmp_path / "model", "qwen3_vl")
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    vision = {**values["vision_config"], **CONFIGS["qwen3_vl"]["vision_config"], **change}
    path.write_text(json.dumps({**values, "vision_config": vision}), encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_model(str(folder))
