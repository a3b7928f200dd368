"""Checkpoints in the format of AutoGPTQ, decoded by a reference of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qe_edge.formats.convert import convert_checkpoint
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import save_quantized
from qe_edge.models.samples import Sample
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import TargetError
from tests.formats.checkpoints import SAMPLES, STATIC, assert_the_same, ours, write_checkpoint
from tests.reference.gptq_format import decode_layer

PARTS = ("qweight", "qzeros", "scales", "g_idx")
CASES: dict[str, dict[str, Any]] = {
    "zero points": {"method": "gptq"},
    "three bits": {"method": "rtn", "scheme": "w3a16"},
    "symmetric, per channel": {"method": "rtn", "scheme": "w4a8"},
    "three bits, symmetric": {"method": "rtn", "scheme": "w3a8"},
    "static correction": {"method": "qe", "options": STATIC},
}


def reloaded(folder: Path, like: LoadedModel) -> LoadedModel:
    """A Llama of the decoded weights, with the LoRA as PEFT reads it."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = values.pop("quantization_config")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**values), dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition(".")
        if key == "qweight":
            own = {part: tensors[f"{layer}.{part}"].numpy() for part in PARTS}
            plain[f"{layer}.weight"] = torch.from_numpy(decode_layer(own, section["bits"], section["format"])).float()
        elif key not in PARTS:
            plain[name] = tensor
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert unexpected == []
    assert missing == ["lm_head.weight"]  # which is the embedding
    model.tie_weights()
    if (folder / "adapter").is_dir():
        model = PeftModel.from_pretrained(model, folder / "adapter")
    return LoadedModel(model.eval(), like.family, like.processor, str(folder))


@pytest.mark.parametrize("case", CASES)
def test_codes_stand_for_the_weights_that_we_have(case: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, **CASES[case])
    symmetric = "symmetric" in case
    convert_checkpoint(checkpoint, "gptq", tmp_path / "out", drop_rounding=symmetric)
    section = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert section["block_name_to_quantize"] == "model.layers"
    assert len(section["modules_in_block_to_quantize"][0]) == 7
    wanted = ours(checkpoint)
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


def test_channel_scales_go_into_norms_alone(tmp_path: Path) -> None:
    """Scales are float16 there, and have no room for those of a later layer."""
    checkpoint = write_checkpoint(tmp_path, "awq", sizes={"num_key_value_heads": 4})
    with pytest.raises(TargetError, match=r"self_attn.o_proj' \(and 3 more\) has channel scales"):
        convert_checkpoint(checkpoint, "gptq", tmp_path / "out")
    convert_checkpoint(checkpoint, "gptq", tmp_path / "out", decode=True)
    section = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    (coded,) = section["modules_in_block_to_quantize"]
    assert len(coded) == 5
    assert not {"self_attn.o_proj", "mlp.down_proj"} & set(coded)
    wanted = ours(checkpoint)
    assert_the_same(reloaded(tmp_path / "out", wanted), wanted, SAMPLES)


def test_only_the_language_model_has_codes(small: str, samples: list[Sample], tmp_path: Path) -> None:
    modules = ("language", "visual")
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=modules, calibration={"samples": 4})
    save_quantized(*quantize(load_model(small, torch.float32), recipe, samples), tmp_path / "checkpoint")
    with pytest.raises(TargetError, match=r"'model.visual.blocks.0.*is outside the blocks of the language model"):
        convert_checkpoint(tmp_path / "checkpoint", "gptq", tmp_path / "out")
    convert_checkpoint(tmp_path / "checkpoint", "gptq", tmp_path / "out", decode=True)
    section = json.loads((tmp_path / "out/config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert section["block_name_to_quantize"] == "model.language_model.layers"
    assert all(name.startswith("-:.*visual") or name == "-:.*lm_head.*" for name in section["dynamic"])
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name, layer in quantized_linears(ours(tmp_path / "checkpoint").model).items():
        coded = name.startswith("model.language_model.layers.")
        assert (f"{name}.qweight" in tensors) == coded
        assert coded or torch.equal(tensors[f"{name}.weight"], layer.decoded_weight())
