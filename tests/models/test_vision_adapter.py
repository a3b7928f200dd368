"""The LoRA in a subfolder of Phi-4-multimodal: merged as PEFT applies it, streamed or not, or refused in a sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qe_edge.checkpoint.known_files import ADAPTER
from qe_edge.models.fingerprints import model_parts
from qe_edge.models.loading import LoadedModel, load_model, load_outside_blocks, resolve_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.renaming import rename_model
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ModelError, NumericalError, QENotice
from tests.models.conversations import CASES, torch_logits
from tests.models.model_files import edit
from tests.models.test_phi4_multimodal import write

RANK, ALPHA = 4, 16
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
    "lora_dropout": 0.01,
    "target_modules": r"model.layers.\d+.((self_attn.(qkv|o)_proj)|(mlp.(gate_up|down)_proj))",
}
SAMPLES = [*CASES["batch"], *CASES["text only"]]


def add_adapter(folder: Path) -> Path:
    """A LoRA for every layer of the decoder, large enough to change answers."""
    torch.manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    tensors = {}
    for name in [f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS]:
        rows, columns = weights[f"{name}.weight"].shape
        for part, sizes in (("A", (RANK, columns)), ("B", (rows, RANK))):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = (0.1 * torch.randn(sizes)).bfloat16()
    (folder / ADAPTER).mkdir()
    save_file(tensors, folder / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / ADAPTER / "adapter_config.json").write_text("{}")
    edit(folder / ADAPTER / "adapter_config.json", lambda table: table.update(CONFIG))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return add_adapter(write(tmp_path / "model"))


def peft_logits(loaded: LoadedModel, folder: Path) -> Tensor:
    """What transformers computes with the adapter beside the weights, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    model.load_adapter(str(folder), adapter_name="vision", adapter_kwargs={"subfolder": ADAPTER})
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, SAMPLES, answers=True))
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()]


def logits_of(loaded: LoadedModel) -> Tensor:
    mask = loaded.family.encode(loaded.processor, SAMPLES, answers=True).attention_mask
    return torch.from_numpy(torch_logits(loaded, SAMPLES))[torch.from_numpy(mask).bool()]


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}], ids=str)
def test_it_is_merged_as_peft_applies_it(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / ADAPTER / "adapter_config.json", lambda table: table.update(changes))
    with pytest.warns(QENotice, match=r"is merged into the language model, which answers texts with it too"):
        loaded = load_model(str(folder), torch.float32)
    wanted = peft_logits(loaded, folder)
    assert (logits_of(loaded) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    (folder / ADAPTER).rename(folder / "elsewhere")
    with pytest.warns(QENotice, match="has no folder 'vision-lora', whose adapter this model needs for pictures"):
        base = load_model(str(folder), torch.float32)
    assert (logits_of(base) - wanted).abs().max() > 0.1 * wanted.abs().max()


def test_streamed_blocks_have_the_same_weights_and_a_checkpoint_has_them_once(folder: Path, tmp_path: Path) -> None:
    """Weights that stay in their files are merged whenever they are read; a second load merges nothing."""
    whole, streamed = load_model(str(folder)), load_outside_blocks(str(folder))
    names = [f"model.layers.1.{linear}.weight" for linear in LINEARS]
    for name in names:
        weight = streamed.model.get_parameter(name)
        assert streamed.stored.is_absent(weight)
        assert torch.equal(streamed.stored.value(name, weight), whole.model.get_parameter(name))
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=("merger",))
    save_quantized(*quantize(str(folder), recipe, SAMPLES), tmp_path / "checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("error", QENotice)
        again = load_quantized(tmp_path / "checkpoint")
    assert all(torch.equal(again.model.get_parameter(name), whole.model.get_parameter(name)) for name in names)


def test_it_is_a_part_of_the_model(folder: Path, tmp_path: Path) -> None:
    """A run is not resumed with another adapter, and `convert --as` keeps it."""
    parts = model_parts(str(folder))
    assert {f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/adapter_model.safetensors"} <= set(parts)
    rename_model(folder, "phi4_multimodal", tmp_path / "renamed")
    assert model_parts(str(tmp_path / "renamed"))[f"{ADAPTER}/adapter_model.safetensors"] in parts.values()


def tensors_of(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
HEAD = "base_model.model.lm_head.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop(A), "has no tensor 'base_model.model.model.layers.0.mlp.down_proj.lora_A"),
        (lambda tensors: tensors.clear(), "has no tensor 'lora_A.weight'"),
        (lambda tensors: tensors.update({A: torch.zeros(RANK, 3)}), r"of shape \[4, 3\], is none of a LoRA of rank 4"),
        (lambda tensors: tensors.update({A: torch.zeros(RANK, 160, dtype=torch.int8)}), "I8 of shape .* is none of"),
        (lambda tensors: tensors.update({HEAD: torch.zeros(RANK, 192)}), "lm_head.lora_A.weight' of .* is none of"),
        (lambda tensors: tensors.update({A.replace("lora_A", "lora_magnitude"): torch.zeros(1)}), "is none of a LoRA"),
    ],
)
def test_tensors_that_do_not_fit(folder: Path, change: Callable[[dict[str, Tensor]], object], complaint: str) -> None:
    tensors_of(folder, change)
    with pytest.raises(ModelError, match=f"{complaint}.*merge_and_unload"):
        load_outside_blocks(str(folder))


def test_numbers_that_are_not_finite(folder: Path) -> None:
    tensors_of(folder, lambda tensors: tensors[A].fill_(float("nan")))
    with pytest.raises(NumericalError, match=r"The adapter of 'model\.layers\.0\.mlp\.down_proj' .* NaN"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"use_dora": True}, "'use_dora' is set, and QE-Edge merges a plain LoRA alone"),
        ({"rank_pattern": {"down_proj": 8}}, "'rank_pattern' is set"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is set"),
        ({"bias": "all"}, "Key 'bias'"),
        ({"init_lora_weights": "pissa"}, "Key 'init_lora_weights"),
        ({"peft_type": "VERA"}, "Key 'peft_type'"),
        ({"r": 8}, "is none of a LoRA of rank 8"),
        ({"lora_alpha": float("inf")}, "Key 'lora_alpha'"),
    ],
    ids=str,
)
def test_other_adapters_are_refused(folder: Path, changes: dict[str, Any], complaint: str) -> None:
    edit(folder / ADAPTER / "adapter_config.json", lambda table: table.update(changes))
    with pytest.raises(ModelError, match=f"{complaint}.*merge_and_unload"):
        load_outside_blocks(str(folder))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter(folder: Path, name: str) -> None:
    """A folder with pickled weights alone is one too."""
    (folder / ADAPTER / name).rename(folder / ADAPTER / "adapter_model.bin")
    with pytest.raises(ModelError, match=f"The folder 'vision-lora' of .* has no {name}"):
        load_outside_blocks(str(folder))


def test_links_out_of_the_model(folder: Path, tmp_path: Path) -> None:
    moved = (folder / ADAPTER).rename(tmp_path / "elsewhere")
    (folder / ADAPTER).symlink_to(moved)
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        resolve_model(str(folder))
    (folder / ADAPTER).unlink()
    (folder / ADAPTER).mkdir()
    (folder / ADAPTER / "adapter_config.json").symlink_to(moved / "adapter_config.json")
    with pytest.raises(ModelError, match="leads out of the model's folder"):
        resolve_model(str(folder))
