"""Small checkpoints of every kind that is converted, and what other libraries make of the folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers import CompressedTensorsConfig

from qe_edge.layers.linear import quantized_linears
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.samples import Sample
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from tests.models.conversations import greedy, torch_logits
from tests.small_models import write_small_llama

SAMPLES = [
    Sample(None, "is it red?", "no"),
    Sample(None, "what is the color of the shape?", "blue"),
    Sample(None, "is there a circle or a square?", "a circle"),
]
STATIC = {"experts": 0, "tokens": 128, "em_steps": 0}  # of Quant Experts: one correction for all tokens
TOKENS = 8  # of an answer


def write_checkpoint(
    out: Path,
    method: str,
    scheme: str = "w4a16",
    *,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, int] | None = None,
    **recipe: Any,  # noqa: ANN401 - of the recipe
) -> Path:
    """A quantized Llama of two layers; `sizes` are those of its configuration that differ."""
    source = write_small_llama(out / "model", **(sizes or {}))
    made = make_recipe(method=method, scheme=scheme, calibration={"samples": len(SAMPLES)}, **recipe)
    loaded = load_model(str(source), dtype)
    for parameter in loaded.model.parameters():
        if parameter.ndim == 1:  # norms whose gains are not all one
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    save_quantized(*quantize(loaded, made, SAMPLES), out / "checkpoint")
    return out / "checkpoint"


def ours(checkpoint: Path) -> LoadedModel:
    """A checkpoint in float32, with activations as they are: what other runtimes compute."""
    loaded = load_quantized(checkpoint)
    loaded.model.float()
    for layer in quantized_linears(loaded.model).values():
        layer.activation_bits = 0
    return loaded


def reloaded(folder: Path, like: LoadedModel) -> LoadedModel:
    """A converted folder as transformers' own loader reads it in float32, with the LoRA as PEFT reads it."""
    automatic: Any = getattr(transformers, like.family.auto_class)
    given: dict[str, Any] = {}
    if "dequantize=True" in (folder / "README.md").read_text(encoding="utf-8"):
        given["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = automatic.from_pretrained(folder, dtype=torch.float32, **given)
    if (folder / "adapter").is_dir():
        model = PeftModel.from_pretrained(model, folder / "adapter")
    return LoadedModel(model.eval(), like.family, like.processor, str(folder))


def assert_the_same(found: LoadedModel, wanted: LoadedModel, samples: list[Sample]) -> None:
    """Logits equal to 1e-5 of the largest, and the same greedy tokens."""
    expected, got = torch_logits(wanted, samples), torch_logits(found, samples)
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    assert greedy(found, samples, TOKENS) == greedy(wanted, samples, TOKENS)
