"""Qwen3.5: what has to hold for every family, and the gated delta rule's body for other runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from transformers import Qwen3VLProcessor

from qe_edge.export.linear_attention import attach_linear_attention
from tests.models.families import FamilyChecks, Made, check_device_engines
from tests.models.qwen_models import write_qwen
from tests.models.video_checks import VideoChecks

HEADS, KEY, VALUE = 3, 8, 12
INPUTS = {
    "q": (2, 5, HEADS * KEY),
    "k": (2, 5, HEADS * KEY),
    "v": (2, 5, HEADS * VALUE),
    "s": (2, HEADS, KEY, VALUE),
    "g": (2, 5, HEADS),
    "b": (2, 5, HEADS),
}


class TestQwen35(VideoChecks, FamilyChecks):
    processor_class = Qwen3VLProcessor
    video_processor = "qwen3_vl"
    linears = {"visual": 4 * 4, "merger": 2, "language": 2 * 8 + 7}  # noqa: RUF012
    unrotated = 1  # a quarter of a head is rotated

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_qwen(tmp_path_factory.mktemp("model") / "qwen3_5", "qwen3_5")

    def test_engines_for_gpus_answer_alike(self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        check_device_engines(made, tmp_path, monkeypatch)


def test_the_body_computes_what_onnx_runtimes_own_node_does() -> None:
    generator = np.random.default_rng(0)
    feeds = {name: generator.normal(size=shape).astype(np.float32) * 0.5 for name, shape in INPUTS.items()}
    feeds["g"] = -np.abs(feeds["g"])
    found = []
    for domain in ("com.microsoft", "bodies"):  # under another domain it has no kernel
        given = ", ".join(f"float{list(shape)} {name}" for name, shape in INPUTS.items())
        numbers = f'q_num_heads: int = {HEADS}, kv_num_heads: int = {HEADS}, update_rule: string = "gated_delta"'
        node = f"y, n = com.microsoft.LinearAttention <{numbers}, scale: float = 0.3> (q, k, v, s, g, b)"
        text = f'<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]> g ({given}) => (float[2, 5, 36] y, '
        model = ir.from_onnx_text(f"{text}float[2, 3, 8, 12] n) {{ {node} }}")
        if domain == "bodies":
            attach_linear_attention(model)
            (function,) = model.functions.values()
            for each in (function, model.graph.node(0)):
                each.domain = domain
            model.functions.clear()
            model.functions[function.identifier()] = function
            model.opset_imports[domain] = 1
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
        found.append(session.run(None, feeds))
    for own, body in zip(*found, strict=True):
        assert np.abs(own - body).max() < 1e-5
