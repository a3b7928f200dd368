"""Qwen2-VL: one picture at a time through the visual graph, and what has to hold for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from transformers import Qwen2VLProcessor

from qe_edge.models.loading import LoadedModel
from tests.models.conversations import CASES
from tests.models.families import FamilyChecks, Made
from tests.models.qwen_models import write_qwen
from tests.models.video_checks import VideoChecks


class TestQwen2VL(VideoChecks, FamilyChecks):
    processor_class = Qwen2VLProcessor
    video_processor = "qwen2_vl"
    linears = {"visual": 4 * 4, "merger": 2, "language": 3 * 7}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_qwen(tmp_path_factory.mktemp("model") / "qwen2_vl", "qwen2_vl")

    def test_every_picture_goes_alone(self, original: LoadedModel) -> None:
        encoded = original.family.encode(original.processor, CASES["several turns"])
        feeds = original.family.visual_feeds(encoded)
        assert [4 * len(one["pixel_values"]) for one in feeds] == encoded.pixels["image_grid_thw"].prod(1).tolist()
        values = np.concatenate([one["pixel_values"].reshape(-1, 3 * 2 * 14 * 14) for one in feeds])
        assert np.array_equal(values, encoded.pixels["pixel_values"])

    def test_nothing_in_the_graph_is_as_large_as_all_scores(self, made: Made) -> None:
        """Softmax over all patches would be; attention is a node that ONNX Runtime computes in tiles."""
        graph = onnx.load(made.onnx / "visual.onnx", load_external_data=False).graph
        operators = [node.op_type for node in graph.node]
        assert operators.count("MultiHeadAttention") == 4
        assert "Softmax" not in operators
