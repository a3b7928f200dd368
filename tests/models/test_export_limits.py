"""What cannot be exported is refused before anything is quantized, and torch's dumps stay off the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Gemma3TextConfig, InternVLConfig, LlamaConfig, MistralConfig, Qwen2Config

from qe_edge.export.exporter import export_model
from qe_edge.export.tracing import trace_graph
from qe_edge.models.configuration import load_family
from qe_edge.models.export_limits import check_deployable, check_exportable
from qe_edge.models.family import TEXT, GraphSpec, Sample
from qe_edge.models.loading import load_model
from qe_edge.quantization.plan import make_plan
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import InputError, ModelError
from tests.small_models import CONTEXT, write_small_dinov2, write_small_llama

LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0],
}
SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("config", "problem", "remedy"),
    [
        (
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "axial", "rope_theta": 1e4}),
            "rope_type 'axial'",
            "Choose a model whose",
        ),
        (
            Gemma3TextConfig(
                **SMALL,
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
                },
            ),
            "rope_type 'dynamic' of one kind of layers",
            "Choose a model whose",
        ),
        (
            Qwen2Config(**SMALL, num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"]),
            "layers of the kind 'chunked_attention'",
            "full or sliding-window attention",
        ),
        (
            InternVLConfig(
                text_config={"model_type": "llama", **SMALL, "rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}
            ),
            "rope_type 'su'",
            "Choose a model whose",
        ),
    ],
)
def test_refused(config: Any, problem: str, remedy: str) -> None:  # noqa: ANN401 - transformers' configurations
    with pytest.raises(ModelError, match="cannot be exported") as caught:
        check_exportable(config)
    assert problem in caught.value.problem
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, rope_scaling={"type": "dynamic", "factor": 2.0}),
        LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        LlamaConfig(**SMALL, rope_parameters=LONG),
        LlamaConfig(**SMALL, sliding_window=16),  # which Llama ignores
        MistralConfig(**SMALL, sliding_window=None),
        MistralConfig(**SMALL, sliding_window=32),
        Qwen2Config(**SMALL, num_hidden_layers=2, use_sliding_window=True, sliding_window=32, max_window_layers=1),
        Dinov2Config(),
    ],
)
def test_taken(config: Any) -> None:  # noqa: ANN401 - transformers' configurations
    check_exportable(config)


def test_before_quantizing(tmp_path: Path) -> None:
    kinds: Any = ["chunked_attention"] * 2
    folder = write_small_llama(tmp_path / "model", layer_types=kinds)
    recipe, samples = make_recipe(method="rtn"), [Sample(None, "one two", kind=TEXT)]
    with pytest.raises(ModelError, match="'chunked_attention', which cannot be exported"):
        make_plan(str(folder), recipe, samples)
    with pytest.raises(ModelError, match="'chunked_attention', which cannot be exported"):
        quantize(str(folder), recipe, samples, work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("longest", "rope"),
    [
        (CONTEXT, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
        (4 * CONTEXT, {**LONG, "original_max_position_embeddings": CONTEXT}),
        (CONTEXT, {**LONG, "original_max_position_embeddings": 2 * CONTEXT, "attention_factor": 1.3}),
    ],
    ids=["dynamic", "longrope", "longrope of a shorter model"],
)
def test_frequencies_are_exact_up_to_a_length(tmp_path: Path, longest: int, rope: Any) -> None:  # noqa: ANN401
    """Also of a module whose frequencies follow a longer text that it has seen; longer prompts are refused."""
    source = write_small_llama(tmp_path / "model", rope_parameters=rope, max_position_embeddings=longest)
    loaded = load_model(str(source), torch.float32)
    longer = torch.ones(1, 2 * CONTEXT, dtype=torch.int64)
    with torch.no_grad():
        loaded.model(longer)
    rotary: Any = loaded.model.model.rotary_emb  # type: ignore[union-attr]
    kept = rotary.inv_freq.clone()
    assert torch.equal(kept, rotary.original_inv_freq) == (rope.get("attention_factor") is not None)
    export_model(loaded, tmp_path / "onnx")
    assert torch.equal(rotary.inv_freq, kept)
    assert rotary.rope_type == rope["rope_type"]
    engine = VisionLanguageEngine.load(tmp_path / "onnx", threads=1)
    assert engine.manifest.max_context == CONTEXT
    samples = [Sample(None, "is there a red shape? " * count, kind=TEXT) for count in (1, 16)]
    encoded = engine.encode(samples)
    assert CONTEXT - 40 < encoded.input_ids.shape[1] <= CONTEXT
    valid = encoded.attention_mask.astype(bool)
    with torch.no_grad():
        wanted = loaded.model(**loaded.family.torch_inputs(encoded)).logits.numpy()[valid]
    assert np.abs(engine.logits(encoded)[valid] - wanted).max() / np.abs(wanted).max() < 1e-5
    with pytest.raises(InputError, match="the model reads 128"):
        engine.encode([Sample(None, "is there a red shape? " * 40, kind=TEXT)])


def test_an_encoder_alone_is_not_deployed(tmp_path: Path) -> None:
    family = load_family(str(write_small_dinov2(tmp_path / "model")))
    with pytest.raises(ModelError, match="A 'dinov2' model writes no text, so 'deploy'") as caught:
        check_deployable(family)
    assert "'qe-edge export'" in caught.value.remedy


class Undecided(torch.nn.Module):
    """Computes what depends on its data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Twice the input if its sum is positive."""
        return x * 2 if x.sum() > 0 else x


def test_what_torch_prints_when_it_fails_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    spec = GraphSpec("language", Undecided(), (torch.ones(3),), ["x"], ["y"], (None,), {})
    with pytest.raises(ModelError, match="The language part of the model cannot be exported") as caught:
        trace_graph(spec)
    assert "choose another model" in caught.value.remedy
    assert capfd.readouterr() == ("", "")
