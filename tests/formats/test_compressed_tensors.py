"""Checkpoints as compressed-tensors, read back by transformers, the package compressed-tensors, and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file

from qe_edge.formats.convert import convert_checkpoint
from qe_edge.layers.linear import QELinear, QuantizedLinear, quantized_linears
from qe_edge.models.groups import set_module
from qe_edge.models.loading import load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.samples import Sample
from qe_edge.numerics.grids import WeightGrid, quantize_weight
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import TargetError
from tests.formats.checkpoints import SAMPLES, STATIC, assert_the_same, ours, reloaded, write_checkpoint
from tests.small_models import write_small_llama

NAME = "compressed-tensors"
RTN = make_recipe(method="rtn", scheme="w4a16", calibration={"samples": len(SAMPLES)})
MHA = {"num_key_value_heads": 4}  # no heads share values
CASES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "three bits": {"method": "gptq", "scheme": "w3a16"},
    "symmetric, per channel": {"method": "gptq", "scheme": "w4a8"},
    "static correction": {"method": "qe", "options": STATIC},
    "rotation, head of its own": {"method": "quarot", "sizes": {"tie_word_embeddings": False}},
    "rotation, head of the embedding": {"method": "quarot"},
    "folded scales": {"method": "awq", "sizes": MHA, "dtype": torch.bfloat16},
    "folded scales under a correction": {"method": "qe", "options": {**STATIC, "rounding": "awq"}, "sizes": MHA},
    "a budget: rotated, of several bit widths and ranks": {"method": "qe", "options": STATIC, "budget": {"bits": 6}},
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_reads_what_we_compute(case: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, **CASES[case])
    rounded = CASES[case].get("scheme") == "w4a8"
    said = convert_checkpoint(checkpoint, NAME, tmp_path / "out", drop_rounding=rounded)
    wanted = ours(checkpoint)
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)
    assert any("every code as it was" in line for line in said)
    assert any(line.startswith("Lost: activations") for line in said) == rounded
    assert any("folded into 4 norms and the rows of 4 layers" in line for line in said) == ("scales" in case)


def test_a_vision_language_model_of_all_parts(small: str, samples: list[Sample], tmp_path: Path) -> None:
    modules = ("language", "visual", "merger")
    recipe = make_recipe(method="qe", scheme="w4a16", modules=modules, options=STATIC, calibration={"samples": 4})
    save_quantized(*quantize(load_model(small, torch.float32), recipe, samples), tmp_path / "checkpoint")
    convert_checkpoint(tmp_path / "checkpoint", NAME, tmp_path / "out")
    wanted = ours(tmp_path / "checkpoint")
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, samples)


def test_layers_of_several_kinds_are_written_on_one_grid(tmp_path: Path) -> None:
    """A code of 3 bits is one of 4, a scale of 128 channels that of 4 times 32, and zero points may be 0."""
    loaded, recipe = quantize(load_model(str(write_small_llama(tmp_path / "model")), torch.float32), RTN, SAMPLES)
    name = "model.layers.1.mlp.up_proj"
    weight = quantize_weight(loaded.model.get_submodule(name).decoded_weight(), WeightGrid(3, 32, symmetric=True))
    set_module(loaded.model, name, QELinear(QuantizedLinear(weight, 0)))
    save_quantized(loaded, recipe, tmp_path / "checkpoint")
    said = convert_checkpoint(tmp_path / "checkpoint", NAME, tmp_path / "out")
    assert any("1 of 14 layers: 3 bits in groups of 32 without zero points, written as 4 bits" in line for line in said)
    wanted = ours(tmp_path / "checkpoint")
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dropped_channels_have_codes_that_decode_to_zero(symmetric: bool, tmp_path: Path) -> None:
    loaded, recipe = quantize(load_model(str(write_small_llama(tmp_path / "model")), torch.float32), RTN, SAMPLES)
    name = "model.layers.0.mlp.gate_proj"
    weight = quantize_weight(loaded.model.get_submodule(name).decoded_weight(), WeightGrid(4, 32, symmetric))
    inverse = torch.ones(64, dtype=torch.float16)
    inverse[5:40:7] = 0
    set_module(loaded.model, name, QELinear(QuantizedLinear(weight, 0, inverse)))
    save_quantized(loaded, recipe, tmp_path / "checkpoint")
    said = convert_checkpoint(tmp_path / "checkpoint", NAME, tmp_path / "out")
    assert "5 input channels that the codes leave to the correction have the code of zero." in said
    wanted = ours(tmp_path / "checkpoint")
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


def test_a_head_of_codes_is_decoded(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "rtn", head="int4")
    with pytest.raises(TargetError, match="'lm_head' is the head, which readers of this format keep") as caught:
        convert_checkpoint(checkpoint, NAME, tmp_path / "out")
    assert "--decode" in caught.value.remedy
    convert_checkpoint(checkpoint, NAME, tmp_path / "out", decode=True)
    wanted = ours(checkpoint)
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


def test_the_package_decodes_every_layer_to_the_weight_that_we_have(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "rtn", "w2a16")
    convert_checkpoint(checkpoint, NAME, tmp_path / "out")
    section = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    (group,) = QuantizationConfig.model_validate(section).config_groups.values()
    tensors = load_file(tmp_path / "out/model.safetensors")
    layers = quantized_linears(ours(checkpoint).model)
    assert len(layers) == 14
    for name, layer in layers.items():
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        decoded = PackedQuantizationCompressor.decompress(own, group)["weight"]
        assert torch.equal(decoded, layer.decoded_weight())


def test_what_has_no_codes_elsewhere_is_decoded_when_asked(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "awq")  # heads share values, and their scales differ
    said = convert_checkpoint(checkpoint, NAME, tmp_path / "out", decode=True)
    assert "2 of 14 layers: decoded to ordinary float32 weights." in said
    wanted = ours(checkpoint)
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


@pytest.mark.parametrize("method", ["spqr", "quipsharp", "atom"])
def test_a_checkpoint_without_codes_that_others_know_becomes_an_ordinary_model(method: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, method)
    said = convert_checkpoint(checkpoint, NAME, tmp_path / "out", decode=True)
    assert "No layer has codes left: this is an ordinary model." in said
    wanted = ours(checkpoint)
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


def test_unquantized_tensors_stay_as_they_are(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, "rtn", dtype=torch.bfloat16)
    convert_checkpoint(checkpoint, NAME, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    plain = [name for name in before if name in after]
    assert len(plain) == 6  # the embedding and five norms
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == torch.bfloat16 for name in plain)
    assert load_quantized(checkpoint).processor.tokenizer.get_vocab()
    assert (checkpoint / "tokenizer.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()
