"""Language models alone, one of every architecture: quantize, checkpoint, graphs that equal transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qe_edge.demo import model_path
from qe_edge.export.exporter import export_model
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.samples import Turn
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import ModelError
from tests.models.conversations import greedy, torch_logits
from tests.models.qwen_models import CONFIGS
from tests.small_models import CHAT_TEMPLATE

LAYERS, WINDOW = 3, 8
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "pad_token_id": None,
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}  # so low that they change most numbers
LONGROPE = {  # of three quarters of a head, 12 of 16 numbers
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 1024,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mistral with a window": ("mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 with windows": ("qwen2", {**WINDOWED, "use_sliding_window": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma 2": ("gemma2", {**WINDOWED, "head_dim": 32, "query_pre_attn_scalar": 32, **CAPS}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    "qwen3.5": ("qwen3_5_text", CONFIGS["qwen3_5"]["text"]),
    "phi 3": ("phi3", {"sliding_window": WINDOW}),
    "phi 4 mini": ("phi3", {"rope_parameters": LONGROPE}),
    "gemma 3": ("gemma3_text", {**WINDOWED, "head_dim": 32, "query_pre_attn_scalar": 32}),
}
TEXTS = [
    Sample(None, "is there a red shape in the image? no, the shape is blue.", kind=TEXT),
    Sample(None, "what color is the shape?", "teal"),
    Sample(None, "why?", "no", earlier=(Turn("user", "is it red or blue?"), Turn("assistant", "it is blue"))),
]
LONG = [Sample(None, "is there a red shape? " * 100, kind=TEXT)]


def write(folder: Path, model_type: str, **changes: Any) -> Path:  # noqa: ANN401 - values of a configuration
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    config = AutoConfig.for_model(model_type, **{**SIZES, "eos_token_id": tokenizer.eos_token_id, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.12)
        else:
            torch.nn.init.uniform_(parameter, 0.1, 0.9)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_of(name: str, folder: Path) -> Path:
    """A folder with a model, its checkpoint in W4A16 and its graph."""
    model_type, changes = MODELS[name]
    write(folder / "model", model_type, **changes)
    save_quantized(
        *quantize(str(folder / "model"), make_recipe(method="rtn", scheme="w4a16"), TEXTS), folder / "checkpoint"
    )
    export_model(folder / "checkpoint", folder / "onnx")
    return folder


@pytest.fixture(scope="module", params=list(MODELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    """A model in W4A16 in float32, and the engine of its graph."""
    folder = export_of(request.param, tmp_path_factory.mktemp("decoder"))
    loaded = load_quantized(folder / "checkpoint")
    loaded.model.float()
    return loaded, VisionLanguageEngine.load(folder / "onnx", threads=1)


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS, LONG], ids=["one", "batch", "long"])
def test_the_graph_equals_transformers(made: tuple[LoadedModel, Any], texts: list[Sample]) -> None:
    loaded, engine = made
    kinds = getattr(loaded.family.config, "layer_types", None) or []
    layers = LAYERS * (4 if loaded.family.model_type == "phi3" else 7)
    assert len(quantized_linears(loaded.model)) == layers - 2 * kinds.count("conv") + kinds.count("linear_attention")
    encoded = engine.encode(texts, answers=True)
    valid = encoded.attention_mask.astype(bool)
    wanted = torch_logits(loaded, texts)[valid]
    assert np.abs(engine.logits(encoded)[valid] - wanted).max() / np.abs(wanted).max() < 1e-5
    assert engine.generate_ids(engine.encode(texts), 2 * WINDOW) == greedy(loaded, texts, 2 * WINDOW)


@pytest.mark.parametrize("name", ["qwen3", "gemma", "gemma 3"])
def test_a_rotation_keeps_what_the_model_computes_or_is_refused(name: str, tmp_path: Path) -> None:
    """Gemma's norms multiply by one plus their weights, which a rotation would have to know."""
    model_type, changes = MODELS[name]
    folder = write(tmp_path / "model", model_type, **changes)
    recipe = make_recipe(method="quarot", scheme="w4a16")
    if model_type != "qwen3":
        with pytest.raises(ModelError, match="norm"):
            quantize(str(folder), recipe, TEXTS)
        return
    rotated, _ = quantize(str(folder), recipe, TEXTS)
    wanted = torch_logits(load_model(str(folder), torch.float32), TEXTS[:1])
    assert np.square(torch_logits(rotated, TEXTS[:1]) - wanted).mean() < 0.3 * np.square(wanted).mean()


def test_other_kinds_of_layers_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "qwen2", layer_types=["chunked_attention"] * LAYERS)
    with pytest.raises(ModelError, match="'chunked_attention', which cannot be exported"):
        quantize(str(folder), make_recipe(method="rtn"), TEXTS)
