"""What is saved is what was loaded, tensor by tensor; a checkpoint that lost or gained a tensor is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qe_edge.calibration.sources import load_evaluation
from qe_edge.layers.linear import quantized_linears
from qe_edge.models import quantized as quantized_models
from qe_edge.models.family import TEXT, ModelFamily, Sample
from qe_edge.models.loading import LoadedModel, load_model, load_outside_blocks
from qe_edge.models.quantized import WEIGHTS, load_quantized, save_quantized
from qe_edge.models.unset import unset_parameters
from qe_edge.numerics.schemes import get_scheme
from qe_edge.quantization.preflight import check_weights
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.system.errors import ArtifactError, NumericalError
from tests.sealing import seal
from tests.small_models import write_small_dinov2, write_small_llama
from tests.small_vlm import write_small_vlm

HEAD = "lm_head.weight"
TEXTS = [Sample(None, "A text.", kind=TEXT), Sample(None, "?", "No.")]


def give_own_head(folder: Path) -> Tensor:
    """A head of its own in a file whose configuration says that it is the embedding."""
    tensors = load_file(folder / WEIGHTS)
    embedding = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    head = embedding.flip(0).contiguous()
    save_file({**tensors, HEAD: head}, folder / WEIGHTS, metadata={"format": "pt"})
    return head


def quantized(source: str | LoadedModel) -> tuple[LoadedModel, Recipe]:
    """In awq: with channel scales, and biases where the model has them."""
    family = (load_model(source) if isinstance(source, str) else source).family
    modules = ("visual",) if family.model_type == "dinov2" else ("language",)
    given = TEXTS if family.model_type == "llama" else load_evaluation("demo")[:4]
    return quantize(source, make_recipe(method="awq", scheme="w4a16", modules=modules), given)


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_vl head", "internvl", "llama", "llama untied", "dinov2"])
def source(request: pytest.FixtureRequest, tiny_internvl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    kind = request.param
    if kind == "internvl":
        return tiny_internvl
    if kind.startswith("llama"):
        return write_small_llama(folder, tie_word_embeddings=kind == "llama", attention_bias=True)
    if kind == "dinov2":
        return write_small_dinov2(folder)
    write_small_vlm(folder)
    if kind == "qwen2_vl head":
        give_own_head(folder)
    return folder


def test_every_tensor_comes_back(source: Path, tmp_path: Path) -> None:
    """Also where precisions are mixed, whatever config.json says of one."""
    loaded = load_model(str(source))
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for number, parameter in enumerate(loaded.model.parameters()):
        parameter.data = parameter.data.to(dtypes[number % 3])
    made, recipe = quantized(loaded)
    wanted = made.model.state_dict()
    assert quantized_linears(made.model)
    save_quantized(made, recipe, tmp_path / "checkpoint")
    for _ in range(2):  # what was loaded is saved again
        again = load_quantized(tmp_path / "checkpoint")
        found = again.model.state_dict()
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
        shutil.rmtree(tmp_path / "checkpoint")
        save_quantized(again, recipe, tmp_path / "checkpoint")


def test_no_weight_is_made_before_the_checkpoint_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers that no checkpoint holds are computed; parameters are shapes until the stored ones take their places."""
    save_quantized(*quantized(str(source)), tmp_path / "checkpoint")
    make, devices = quantized_models._empty_model, set()

    def made(folder: str, family: ModelFamily, tensors: dict[str, Tensor]) -> PreTrainedModel:
        model = make(folder, family, tensors)
        devices.update(parameter.device.type for parameter in model.parameters())
        return model

    monkeypatch.setattr(quantized_models, "_empty_model", made)
    model = load_quantized(tmp_path / "checkpoint").model
    assert devices == {"meta"}
    assert [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta] == []


def test_other_threads_make_models_with_weights() -> None:
    with unset_parameters(), ThreadPoolExecutor(1) as pool:
        own, others = nn.Linear(2, 2), pool.submit(nn.Linear, 2, 2).result()
    assert (own.weight.is_meta, others.weight.is_meta) == (True, False)
    assert not nn.Linear(2, 2).weight.is_meta


def test_a_head_of_its_own_stays(tmp_path: Path) -> None:
    folder = write_small_llama(tmp_path / "model")
    head = give_own_head(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    for load in (load_model, load_outside_blocks):
        loaded = load(str(folder))
        loaded.model.tie_weights()
        assert torch.equal(loaded.stored.value(HEAD, loaded.model.state_dict()[HEAD]), head)
    save_quantized(*quantized(str(folder)), tmp_path / "checkpoint")
    config = tmp_path / "checkpoint" / "config.json"
    values = json.loads(config.read_text())
    assert values["tie_word_embeddings"] is False
    config.write_text(json.dumps({**values, "tie_word_embeddings": True}))  # as it was written before
    seal(tmp_path / "checkpoint")
    again = load_quantized(tmp_path / "checkpoint")
    again.model.tie_weights()
    assert torch.equal(again.model.state_dict()[HEAD], head)
    assert again.family.config.tie_word_embeddings is False


def test_a_head_that_equals_the_embedding_is_shared(tmp_path: Path) -> None:
    folder = write_small_llama(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, HEAD: tensors["model.embed_tokens.weight"].clone()}, folder / WEIGHTS, {"format": "pt"})
    for load in (load_model, load_outside_blocks):
        model = load(str(folder)).model
        assert model.config.tie_word_embeddings is True
        assert model.get_parameter(HEAD).data_ptr() == model.get_input_embeddings().get_parameter("weight").data_ptr()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_small_llama(folder / "model", attention_bias=True)
    save_quantized(*quantized(str(folder / "model")), folder / "out")
    return folder / "out"


LAYER = "model.layers.1.self_attn.q_proj"
EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no bias": (lambda t: {k: v for k, v in t.items() if k != f"{LAYER}.bias"}, "tensor 'bias' is missing"),
    "no scale": (
        lambda t: {k: v for k, v in t.items() if k != f"{LAYER}.inv_omega"},
        "shares a tensor '.*q_proj.inv_omega' that is none",
    ),
    "renamed": (lambda t: {k.replace(f"{LAYER}.bias", f"{LAYER}.b"): v for k, v in t.items()}, "does not belong to it"),
    "zero points": (lambda t: {**t, f"{LAYER}.down_scale": torch.ones(1).half()}, "does not belong to it"),
    "inside": (lambda t: {**t, f"{LAYER}.weight": torch.zeros(64, 64)}, "does not belong to it"),
    "deep inside": (lambda t: {**t, f"{LAYER}.base.weight": torch.zeros(64, 64)}, "does not belong to it"),
    "outside": (lambda t: {**t, "model.extra": torch.zeros(2)}, "'model.extra' is missing or unknown"),
    "no norm": (lambda t: {k: v for k, v in t.items() if k != "model.norm.weight"}, "'model.norm.weight' is missing"),
    "tied twice": (lambda t: {**t, HEAD: t["model.embed_tokens.weight"] + 1}, "or is one itself"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_checkpoint_with_other_tensors_is_refused(name: str, checkpoint: Path, tmp_path: Path) -> None:
    edit, problem = EDITS[name]
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    load_quantized(folder)
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
    seal(folder)
    with pytest.raises(ArtifactError, match=problem) as caught:
        load_quantized(folder)
    assert caught.value.remedy == "Quantize the model again."


def test_a_bias_that_nobody_lists_is_missed_all_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """The model's own class knows which of its layers have one."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["layers"][LAYER]["tensors"].remove("bias")
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if name != f"{LAYER}.bias"}, folder / WEIGHTS)
    seal(folder)
    with pytest.raises(ArtifactError, match=f"the bias of '{LAYER}' is missing"):
        load_quantized(folder)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_every_tensor_is_a_number(name: str, value: float, tmp_path: Path) -> None:
    folder = write_small_llama(tmp_path / "model")
    tensors = load_file(folder / WEIGHTS)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for load in (load_model, load_outside_blocks):
        with pytest.raises(NumericalError, match=f"The weights '{name}' hold NaN or infinity") as caught:
            check_weights(load(str(folder)), [], get_scheme("w4a16").weight)
        assert "sound one" in caught.value.remedy
