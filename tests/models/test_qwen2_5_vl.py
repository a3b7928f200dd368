"""Qwen2.5-VL: windows in the visual encoder, and what has to hold for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLProcessor
from transformers.vision_utils import get_vision_window_index

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.runtime.engine import VisionLanguageEngine
from tests.models.conversations import CASES
from tests.models.families import FamilyChecks, Made, token_errors
from tests.models.qwen_models import VISION, write_qwen
from tests.models.video_checks import VideoChecks


class TestQwen25VL(VideoChecks, FamilyChecks):
    processor_class = Qwen2_5_VLProcessor
    video_processor = "qwen2_vl"
    linears = {"visual": 4 * 5, "merger": 2, "language": 3 * 7}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_qwen(tmp_path_factory.mktemp("model") / "qwen2_5_vl", "qwen2_5_vl")

    @pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 8), (10, 26), (40, 6), (2, 64)])
    def test_windows_are_those_of_transformers(self, original: LoadedModel, height: int, width: int) -> None:
        feeds = original.family.frame_feeds(height, width)  # type: ignore[attr-defined] # of this family
        order, bounds = get_vision_window_index(torch.tensor([[1, height, width]]), 2, 112, 14)
        windows, places = feeds["window_groups"], feeds["group_places"]
        held = places[windows] == np.arange(windows.size).reshape(windows.shape)
        assert np.array_equal(windows[held], order.numpy())
        assert np.array_equal(np.cumsum(held.sum(1)) * 4, bounds.numpy()[1:])
        assert np.array_equal(windows.ravel()[places], np.arange(len(places)))
        assert len(windows) <= -(-len(places) // 4)  # what engines are built for


@pytest.mark.parametrize("full", [[], [0, 1, 2, 3]])
def test_windows_everywhere_and_nowhere(full: list[int], tmp_path: Path) -> None:
    vision = {**VISION, "patch_size": 14, "window_size": 112, "fullatt_block_indexes": full}
    loaded = load_model(str(write_qwen(tmp_path / "model", "qwen2_5_vl", vision_config=vision)), torch.float32)
    export_model(loaded, tmp_path / "onnx")
    build_engines(tmp_path / "onnx", tmp_path / "cpu", "cpu")
    engine, built = (VisionLanguageEngine.load(tmp_path / name, threads=1) for name in ("onnx", "cpu"))
    made = Made(loaded, engine, built, tmp_path, tmp_path / "onnx")
    assert token_errors(made, CASES["several turns"]).max() < 1e-5
