"""Targets: models, quantized checkpoints and stopped runs, read by quantizing, loading and resuming."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qe_edge.calibration.sources import load_samples
from qe_edge.models.conversion import convert_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.recipes.stored import load_checkpoint_recipe
from tests.fuzz.target import Target, check_finite, digest, nothing_lost, unchanged
from tests.models.conftest import write_tiny_internvl
from tests.models.test_internvl_original import write_original
from tests.small_models import write_small_dinov2, write_small_llama
from tests.small_vlm import write_small_vlm
from tests.stopping import KilledError, StopAfter

MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": write_small_llama,
    "qwen2-vl": write_small_vlm,
    "internvl": lambda folder: write_tiny_internvl(folder, "llama"),
    "dinov2": write_small_dinov2,
}
MODEL_FILES = ("model/*.json", "model/*.json", "model/*.safetensors", "model/*.jinja")
WORK_RECIPE: dict[str, Any] = {"method": "rtn", "modules": ("language",), "calibration": {"samples": 1}}


def _recipe(name: str, model: Path) -> Recipe:
    source = str(model.with_name("texts.jsonl")) if name == "llama" else "demo"
    modules = ("visual",) if name == "dinov2" else ("language",)
    return make_recipe(method="rtn", modules=modules, calibration={"samples": 1, "source": source})


def _write_model(name: str, folder: Path) -> None:
    MODELS[name](folder / "model")
    texts = [{"text": "a red circle and a blue square"}, {"text": "what color is the shape?"}]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts), encoding="utf-8")


def _shard(folder: Path) -> None:
    """Two files of weights and an index instead of one file."""
    path = folder / "model.safetensors"
    tensors = sorted(load_file(path).items())
    halves = {"model-1.safetensors": dict(tensors[::2]), "model-2.safetensors": dict(tensors[1::2])}
    for file, half in halves.items():
        save_file(half, folder / file, metadata={"format": "pt"})
    places = {key: file for file, half in halves.items() for key in half}
    index = {"metadata": {"total_size": path.stat().st_size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    path.unlink()


def _prepare_model(name: str, *, sharded: bool) -> Callable[[Path, Mapping[str, Path]], object]:
    def prepare(folder: Path, _sound: Mapping[str, Path]) -> None:
        _write_model(name, folder)
        if sharded:
            _shard(folder / "model")

    return prepare


def _quantize(name: str) -> Callable[[Path], str]:
    """Quantize and save; found are the names of the tensors of the checkpoint."""

    def read(folder: Path) -> str:
        recipe = _recipe(name, folder / "model")
        save_quantized(*quantize(str(folder / "model"), recipe), folder / "out")
        tensors = load_file(folder / "out" / "model.safetensors")
        check_finite(tensors)
        return "\n".join(sorted(tensors))

    return read


def _prepare_original(text: str) -> Callable[[Path, Mapping[str, Path]], object]:
    return lambda folder, _sound: write_original(folder / "model", text)


def _convert(folder: Path) -> str:
    """Convert; found are the names of the tensors of the new model."""
    convert_model(str(folder / "model"), folder / "out")
    tensors = {
        name: tensor for path in (folder / "out").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    check_finite(tensors)
    return "\n".join(sorted(tensors))


def _prepare_checkpoint(folder: Path, sound: Mapping[str, Path]) -> None:
    recipe = make_recipe(
        scheme="w4a8", options={"tokens": 128, "em_steps": 0, "experts": 2}, calibration={"samples": 2}
    )
    save_quantized(*quantize(str(sound["model-qwen2-vl"] / "model"), recipe), folder / "checkpoint")


def _read_checkpoint(folder: Path) -> str:
    loaded = load_quantized(folder / "checkpoint")
    recipe = load_checkpoint_recipe(folder / "checkpoint")
    encoded = loaded.family.encode(loaded.processor, load_samples("demo", 1))
    with torch.no_grad():
        answer = loaded.model.generate(  # type: ignore[operator] # from a mixin that the base class does not have
            **loaded.family.torch_inputs(encoded), max_new_tokens=2, do_sample=False
        )
    check_finite(loaded.model.state_dict())
    return digest(dict(loaded.model.state_dict()), recipe.model_dump(), answer)


def _prepare_work(folder: Path, sound: Mapping[str, Path]) -> None:
    shutil.copytree(sound["model-qwen2-vl"] / "model", folder / "model")
    before = Path.cwd()
    os.chdir(folder)  # a run belongs to the model as it is named
    with suppress(KilledError):
        quantize("model", make_recipe(**WORK_RECIPE), work=Path("out.work"), progress=StopAfter(2))
    os.chdir(before)


def _resume(folder: Path) -> str:
    recipe = make_recipe(**WORK_RECIPE)
    loaded, resolved = quantize("model", recipe, work=Path("out.work"), resume=True)
    save_quantized(loaded, resolved, folder / "out")
    return digest((folder / "out" / "model.safetensors").read_bytes(), (folder / "out" / "recipe.json").read_bytes())


def _prepare_weights(folder: Path, sound: Mapping[str, Path]) -> None:
    shutil.copy(sound["model-llama"] / "model" / "model.safetensors", folder / "model.safetensors")


def _read_weights(folder: Path) -> str:
    from safetensors import safe_open

    from qe_edge.checkpoint.safetensors_check import check_safetensors

    header = check_safetensors(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in header:
            file.get_tensor(name)
    return ""


TARGETS = (
    *(
        Target(f"model-{name}", _prepare_model(name, sharded=False), _quantize(name), MODEL_FILES, judge=nothing_lost)
        for name in MODELS
    ),
    Target(
        "model-sharded", _prepare_model("llama", sharded=True), _quantize("llama"), ("model/*index.json", "model/*"),
        judge=nothing_lost,
    ),
    *(
        Target(f"original-{text}", _prepare_original(text), _convert, (*MODEL_FILES, "model/*.model"),
               judge=nothing_lost)
        for text in ("internlm2", "qwen2")
    ),
    Target("weights", _prepare_weights, _read_weights, ("*.safetensors",), after="model-llama"),
    Target("checkpoint", _prepare_checkpoint, _read_checkpoint, ("checkpoint/*",), after="model-qwen2-vl"),
    Target("work", _prepare_work, _resume, ("out.work/*",), after="model-qwen2-vl", judge=unchanged,
        repairs=True),
)  # fmt: skip
