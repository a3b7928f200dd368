"""Qwen2-VL: one picture at a time through the visual graph, and what has to hold for every family."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from transformers import Qwen2VLProcessor

from qe_edge.cli.run import command
from qe_edge.models.loading import LoadedModel
from qe_edge.models.videos import Video
from qe_edge.runtime.limits import EngineLimits, check_limits
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.system.errors import InputError
from tests.models.conversations import CASES, noise
from tests.models.families import TOKENS, FamilyChecks, Made
from tests.models.qwen_models import write_qwen
from tests.models.video_checks import VIDEO_CASES, VideoChecks


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

    def test_the_command_line_and_the_server_show_videos(self, made: Made, tmp_path: Path) -> None:
        """A folder of frames, and an animated picture in a request, are the frames that a pipeline gets."""
        pytest.importorskip("uvicorn", reason="of an extra")
        serving = pytest.importorskip("tests.server.conftest").serving
        frames = [noise(64, 64 + number).crop((0, 0, 64, 64)) for number in range(4)]
        (tmp_path / "film").mkdir()
        for number, frame in enumerate(frames):
            frame.save(tmp_path / f"film/{number}.png")
        frames[0].save(tmp_path / "film.webp", save_all=True, append_images=frames[1:], lossless=True, duration=500)
        question = "what color is it?"
        wanted = Pipeline(made.built)(question, Video(frames, 2), max_new_tokens=TOKENS, temperature=0)
        options = ["--video", str(tmp_path / "film"), "--video-fps", "2", "--max-tokens", str(TOKENS)]
        outcome = CliRunner().invoke(command, [str(made.onnx.parent / "cpu"), *options, "--prompt", question])
        assert outcome.stdout == f"{wanted.text}\n"
        assert "video " in outcome.stderr
        url = "data:image/webp;base64," + base64.b64encode((tmp_path / "film.webp").read_bytes()).decode()
        content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}]
        with serving(made.built) as served:
            answer = served.client.chat.completions.create(
                model="shapes", messages=[{"role": "user", "content": content}], max_tokens=TOKENS, temperature=0
            )
        assert answer.choices[0].message.content == wanted.text
        assert answer.usage.prompt_tokens == wanted.timings.prompt_tokens

    def test_calibration_and_validation_know_videos(self, made: Made, tmp_path: Path) -> None:
        """Answers in several turns count as answers, and a video's features as pictures."""
        encoded = made.engine.encode(VIDEO_CASES["in several turns"], answers=True)
        spoken = made.loaded.processor.tokenizer.decode(encoded.input_ids[encoded.answer_mask])
        assert spoken == "yes<|im_end|>no<|im_end|>no<|im_end|>"
        assert encoded.image_mask.sum() * 4 == sum(
            encoded.pixels[name].prod(1).sum() for name in ("image_grid_thw", "video_grid_thw")
        )
        larger = replace(encoded, pixels={**encoded.pixels, "video_grid_thw": np.array([[2, 27, 37]])})
        with pytest.raises(InputError, match="a picture of 999 patches") as caught:
            check_limits(EngineLimits(patches=998), larger, 1)
        assert "--max-patches 999" in caught.value.remedy

    def test_nothing_in_the_graph_is_as_large_as_all_scores(self, made: Made) -> None:
        """Softmax over all patches would be; attention is a node that ONNX Runtime computes in tiles."""
        graph = onnx.load(made.onnx / "visual.onnx", load_external_data=False).graph
        operators = [node.op_type for node in graph.node]
        assert operators.count("MultiHeadAttention") == 4
        assert "Softmax" not in operators
