"""A model is loaded exactly or not at all: what is missing, left over, renamed, foreign or misplaced is named."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2ForImageClassification

from qe_edge.cli.inputs import open_model
from qe_edge.models import FAMILIES
from qe_edge.models.loading import load_model, load_outside_blocks
from qe_edge.system.errors import ArtifactError, ModelError, QEError
from tests.small_models import write_small_dinov2, write_small_llama

Tensors = dict[str, Tensor]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, UP = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.up_proj"
EXTRA = "model.layers.7.mlp.up_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("exact") / "llama")


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change(folder: Path, what: Callable[[Tensors], Tensors]) -> None:
    tensors = what(load_file(folder / SINGLE))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:  # noqa: ANN401 - any JSON
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard(folder: Path) -> dict[str, str]:
    """Put the norms of the layers into a second file; returns the index's map."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {name: f"model-0000{1 + ('layernorm' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return files


def assert_refused(folder: Path, problem: str, remedy: str, kind: type[QEError] = ModelError) -> None:
    """From the command line and from Python; nothing is written."""
    before = sorted(folder.iterdir())
    for load in (open_model, load_model, load_outside_blocks):
        with pytest.raises(kind) as caught:
            load(str(folder))
        assert problem in caught.value.problem
        assert remedy in caught.value.remedy
    assert sorted(folder.iterdir()) == before


NAMES: dict[str, tuple[Callable[[Tensors], Tensors], str, str]] = {
    "missing": (
        lambda t: {k: v for k, v in t.items() if k != NORM},
        f"lack 1 of the model's tensors, among them '{NORM}'",
        "again",
    ),
    "too many": (lambda t: {**t, EXTRA: torch.zeros(128, 64)}, f"none of the model's, among them '{EXTRA}'", "anew"),
    "renamed": (
        lambda t: {k.replace(".mlp.", ".ffn."): v for k, v in t.items()},
        "lack 6 of the model's tensors",
        "anew",
    ),
    "two for one place": (lambda t: {**t, NORM.removeprefix("model."): t[NORM] + 1}, "none of the model's", "anew"),
    "shape": (
        lambda t: {**t, NORM: torch.ones(32).bfloat16()},
        "has the shape [32], and config.json says [64]",
        "anew",
    ),
    "data parallel": (
        lambda t: {f"module.{k}": v for k, v in t.items()},
        "is named as DataParallel names it",
        "strip 'module.'",
    ),
    "compiled inside": (
        lambda t: {k.replace("model.", "model._orig_mod.", 1): v for k, v in t.items()},
        "as torch.compile names it",
        "wrapper",
    ),
    "fsdp": (lambda t: {f"_fsdp_wrapped_module.{k}": v for k, v in t.items()}, "as FSDP names it", "wrapper"),
    "lora inside": (
        lambda t: {**t, f"{UP}.lora_A.default.weight": torch.zeros(4, 64)},
        "an adapter that was not merged",
        "merge_and_unload",
    ),
    "peft": (
        lambda t: {f"base_model.model.{k}": v for k, v in t.items()},
        "an adapter that was not merged",
        "merge_and_unload",
    ),
    "fp8 block scales": (
        lambda t: {**t, f"{UP}.weight_scale_inv": torch.ones(1, 1)},
        "what a quantizer writes",
        "dequantize",
    ),
    "bitsandbytes": (lambda t: {**t, f"{UP}.weight.absmax": torch.ones(8)}, "what a quantizer writes", "dequantize"),
    "fp8 alone": (lambda t: {**t, NORM: t[NORM].to(torch.float8_e5m2)}, "has the type F8_E5M2", "dequantize"),
    "bytes": (
        lambda t: {**t, NORM: t[NORM].to(torch.uint8)},
        "has the type U8; unquantized weights are BF16",
        "dequantize",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_do_not_fit_are_named(name: str, folder: Path) -> None:
    what, problem, remedy = NAMES[name]
    change(folder, what)
    assert_refused(folder, problem, remedy)


def test_computed_buffers_of_old_files_are_no_surprise(folder: Path) -> None:
    change(folder, lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that nobody reads them in float32 is no loss
        for load in (load_model, load_outside_blocks):
            load(str(folder))


def test_a_larger_vocabulary_takes_no_memory(folder: Path) -> None:
    set_config(folder, vocab_size=2**20)
    assert_refused(folder, "million weights, and the files hold 0 million", "again")


def test_far_too_few_weights_take_no_memory(folder: Path) -> None:
    set_config(folder, hidden_size=8192, intermediate_size=65536)
    assert_refused(folder, "million weights, and the files hold 0 million", "again")


def test_a_classifier_is_not_its_backbone(tmp_path: Path) -> None:
    folder = write_small_dinov2(tmp_path / "model")
    config = Dinov2Config.from_pretrained(folder, num_labels=3)
    Dinov2ForImageClassification(config).save_pretrained(folder)
    assert_refused(folder, "'classifier.bias'", "It was saved as a Dinov2ForImageClassification")


@pytest.mark.parametrize(
    ("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8), ("F8_E4M3FNUZ", 8), ("F8_E4M3", 8)]
)
def test_narrow_types_are_not_damage(dtype: str, bits: int, folder: Path) -> None:
    write_one(folder / SINGLE, dtype, 16 * bits // 8)
    assert_refused(folder, f"has the type {dtype}", "dequantize")


def test_a_type_of_the_future_is_named(folder: Path) -> None:
    write_one(folder / SINGLE, "F3", 6)
    assert_refused(folder, "has the type 'F3', which QE-Edge does not know", "bfloat16", ArtifactError)


def write_one(path: Path, dtype: str, size: int) -> None:
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": [16], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"quantization_config": {"quant_method": "hqq"}}, "already by the method 'hqq'"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "already by the method 'NVFP4'"),
        ({"quantization_config": {}}, "config.json holds 'quantization_config'"),
        ({"compression_config": {"format": "x"}}, "config.json holds 'compression_config'"),
        ({"quantization": {"bits": 4}}, "config.json holds 'quantization'"),
        ({"text_config": {"quantization_config": {"bits": 8}}}, "config.json holds 'text_config.quantization_config'"),
        ({"quantization_config": {"quant_method": "qe-edge"}}, "quantized already"),
    ],
)
def test_settings_of_a_quantizer_in_the_configuration(values: dict[str, Any], problem: str, folder: Path) -> None:
    set_config(folder, **values)
    assert_refused(folder, problem, "original model")


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quant_config.json", "quantization_config.json"])
def test_settings_of_a_quantizer_beside_the_weights(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    assert_refused(folder, f"is quantized already: it holds '{name}'", "original model")


def test_an_adapter(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"")
    assert_refused(folder, "holds an adapter ('adapter_model.bin') beside the model", "merge_and_unload")
    (folder / "config.json").unlink()
    assert_refused(folder, "is an adapter ('adapter_model.bin'), not a model", "Merge the adapter")


@pytest.mark.parametrize(
    "values",
    [{"model_type": "internvl_chat"}, {"auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"}}],
)
def test_internvl_in_its_original_layout(values: dict[str, Any], folder: Path) -> None:
    set_config(folder, **values)
    assert_refused(folder, "an InternVL model in its original layout", "qe-edge convert")


def test_another_family_names_those_that_there_are(folder: Path) -> None:
    set_config(folder, model_type="mamba")
    assert_refused(folder, "is a 'mamba' model", f"Supported: {', '.join(FAMILIES)}.")


def test_a_model_in_several_files(folder: Path) -> None:
    files = shard(folder)
    whole = load_model(str(folder)).model.state_dict()
    assert set(files) <= set(whole)
    (folder / "._model.safetensors").write_bytes(b"macOS")
    load_outside_blocks(str(folder))


SHARDS: dict[str, tuple[Callable[[Path, dict[str, str]], object], str, str]] = {
    "missing": (lambda f, _: (f / SECOND).unlink(), "lacks 1 of 2 weight files, among them 'model-00002", "again"),
    "no index": (lambda f, _: (f / INDEX).unlink(), f"neither '{SINGLE}' nor '{INDEX}'", "index"),
    "stale": (lambda f, _: shutil.copy(f / SECOND, f / "old.safetensors"), "'old.safetensors' in", "leftover"),
    "both": (lambda f, _: shutil.copy(f / SECOND, f / SINGLE), "only one of them is the model", "Remove"),
    "not listed": (
        lambda f, m: index(f, {k: v for k, v in m.items() if k != NORM}),
        f"holds '{NORM}', which",
        "different versions",
    ),
    "not held": (lambda f, m: index(f, {**m, NORM: FIRST}), f"holds '{NORM}', which it does not", "again"),
    "outside": (
        lambda f, m: index(f, {**m, NORM: "../other.safetensors"}),
        "lists '../other.safetensors', which is no file of its folder",
        "nothing outside",
    ),
    "absolute": (lambda f, m: index(f, {**m, NORM: "/etc/passwd"}), "lists '/etc/passwd'", "nothing outside"),
    "backslash": (
        lambda f, m: index(f, {**m, NORM: "..\\x.safetensors"}),
        "which is no file of its folder",
        "nothing outside",
    ),
    "pickle": (lambda f, m: index(f, {**m, NORM: "pytorch_model.bin"}), "no .safetensors file", "again"),
    "numbers": (lambda f, m: index(f, {**m, NORM: 3}), "no table 'weight_map'", "again"),
}


def index(folder: Path, files: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("name", SHARDS)
def test_weight_files_that_are_not_those_of_the_index(name: str, folder: Path) -> None:
    what, problem, remedy = SHARDS[name]
    what(folder, shard(folder))
    assert_refused(folder, problem, remedy)


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    assert_refused(folder, "holds no .safetensors file", "pickled weights")


def test_links_stay_inside_the_download(llama: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1f", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(llama.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    load_outside_blocks(open_model(str(snapshot)))
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(llama / SINGLE)
    assert_refused(snapshot, "leads out of the model's folder", "cp -rL")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(SINGLE)
    assert_refused(snapshot, "points at a missing file", "again")
