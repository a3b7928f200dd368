"""Checkpoints as GGUF, read back by transformers' own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qe_edge.demo import model_path
from qe_edge.formats.convert import convert_checkpoint
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import save_quantized
from qe_edge.models.samples import Sample
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import TargetError
from tests.formats.checkpoints import SAMPLES, STATIC, assert_the_same, ours, write_checkpoint
from tests.models.random_models import save_random_model
from tests.small_models import CHAT_TEMPLATE

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "pad_token_id": None,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "zero points": ("llama", {}, {"method": "rtn"}, "Q8_0"),
    "three bits": ("qwen2", {}, {"method": "rtn", "scheme": "w3a16"}, "Q4_0"),
    "symmetric, per channel": ("llama", {}, {"method": "rtn", "scheme": "w4a8"}, "Q4_0"),
    "a head of 4 bits": ("qwen2", {"tie_word_embeddings": True}, {"method": "rtn", "head": "int4"}, "Q8_0"),
    # transformers reads no size of heads for Qwen3, and takes its usual one
    "qwen3, static correction": ("qwen3", {"head_dim": 128}, {"method": "qe", "options": STATIC}, "Q8_0"),
    "a budget": ("llama", {}, {"method": "qe", "options": STATIC, "budget": {"bits": 5.4}}, "Q8_0"),
}


def write_decoder(out: Path, model_type: str, sizes: dict[str, Any], recipe: dict[str, Any]) -> Path:
    """A checkpoint of a language model of an architecture, whose norms are not all ones."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template = CHAT_TEMPLATE
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes, "eos_token_id": tokenizer.eos_token_id})
    save_random_model(AutoModelForCausalLM.from_config, config, tokenizer, out / "model", (0.5, 1.5))
    made = make_recipe(**{"scheme": "w4a16", **recipe}, calibration={"samples": len(SAMPLES)})
    save_quantized(*quantize(load_model(str(out / "model"), torch.float32), made, SAMPLES), out / "checkpoint")
    return out / "checkpoint"


def reloaded(folder: Path, like: LoadedModel) -> LoadedModel:
    """The file as transformers' own loader reads it in float32, with the LoRA added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    if (folder / "adapter.gguf").is_file():
        for name, delta in adapter_of(folder / "adapter.gguf", like).items():
            model.get_submodule(name).weight.data += delta
    return LoadedModel(model.eval(), like.family, like.processor, str(folder))


def adapter_of(path: Path, like: LoadedModel) -> dict[str, torch.Tensor]:
    """`lora_b @ lora_a` of every layer, in transformers' names and order of rows."""
    config = like.family.config
    reader = gguf.GGUFReader(path)
    assert reader.get_field("adapter.lora.alpha").contents() == 0.0
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    found = {}
    for name in quantized_linears(like.model):
        weight = f"{table.get_name(name)}.weight"
        if f"{weight}.lora_b" not in tensors:
            continue
        delta = torch.from_numpy(tensors.pop(f"{weight}.lora_b") @ tensors.pop(f"{weight}.lora_a"))
        if config.model_type == "llama" and name.endswith(("q_proj", "k_proj")):
            half = config.head_dim // 2  # neighbours there are halves of a head here
            rows = [
                head + 2 * (row % half) + row // half
                for head in range(0, len(delta), 2 * half)
                for row in range(2 * half)
            ]
            delta = delta[rows]
        found[name] = delta
    assert not tensors
    return found


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_compute(case: str, tmp_path: Path) -> None:
    model_type, sizes, recipe, kind = CASES[case]
    checkpoint = write_decoder(tmp_path, model_type, sizes, recipe)
    convert_checkpoint(checkpoint, "gguf", tmp_path / "out", drop_rounding=recipe.get("scheme") == "w4a8")
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors]
    assert kinds.count(kind) == 14
    wanted = ours(checkpoint)
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "rtn")
    convert_checkpoint(checkpoint, "gguf", tmp_path / "out")
    here, there = (
        AutoTokenizer.from_pretrained(checkpoint),
        AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf"),
    )
    text = "<|im_start|>user\nIs there a red shape, or 2?<|im_end|>\n"
    assert here(text).input_ids == there(text).input_ids
    reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
    assert reader.get_field("tokenizer.ggml.pre").contents() == "gpt-2"
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == here.eos_token_id
    assert reader.get_field("tokenizer.chat_template").contents() == here.chat_template


def test_vision_language_models_are_refused(small: str, samples: list[Sample], tmp_path: Path) -> None:
    recipe = make_recipe(method="rtn", scheme="w4a16", calibration={"samples": 4})
    save_quantized(*quantize(load_model(small, torch.float32), recipe, samples), tmp_path / "checkpoint")
    with pytest.raises(TargetError, match="'qwen2_vl' is none of the language models llama, qwen2, qwen3") as caught:
        convert_checkpoint(tmp_path / "checkpoint", "gguf", tmp_path / "out")
    assert "--to compressed-tensors" in caught.value.remedy
