"""A rotated language model computes what it did before, survives a checkpoint, and others are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qe_edge.budget.accounting import count_bits, rotation_bits
from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.causal_lm import CausalLM
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.rotation import mixing_of, rotate_language_model
from qe_edge.numerics.orthogonal import hadamard_like, random_rotation
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ArtifactError, ModelError
from tests.sealing import seal
from tests.small_models import write_small_llama
from tests.stopping import KilledError, StopAfter


def logits(loaded: LoadedModel, encoded: Encoded) -> Tensor:
    with torch.no_grad():
        found: Tensor = loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False).logits
    return found[torch.from_numpy(encoded.attention_mask).bool()]


def uneven_gains(loaded: LoadedModel) -> None:
    """Norms whose gains are far from one, and biases where there are such, so that nothing folds away by itself."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data = parameter.data * (0.3 + 2 * torch.rand(parameter.shape, generator=generator))


def tiny_llama(*, tied: bool = True) -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=20, attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return LoadedModel(model, CausalLM(config), None, "")


def encoded_for(loaded: LoadedModel, samples: list[Sample]) -> Encoded:
    if loaded.processor is not None:
        return loaded.family.encode(loaded.processor, samples, answers=True)
    ids = np.random.default_rng(0).integers(0, 90, (3, 11))
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    nothing = np.zeros(ids.shape, bool)
    return Encoded(ids, mask, nothing, nothing)


@pytest.mark.parametrize("size", [1, 2, 8, 12, 20, 48, 7, 1536])
def test_rotations_are_orthogonal_and_spread(size: int) -> None:
    for rotation in (hadamard_like(size), random_rotation(size, np.random.default_rng(0))):
        matrix = rotation.matrix()
        rows = torch.randn(3, 2, size, dtype=torch.float64)
        assert torch.allclose(rotation(rows), rows @ matrix, atol=1e-12)
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
        assert matrix.abs().max() <= (2 / size) ** 0.5 + 1e-12
    signs = random_rotation(size, np.random.default_rng(0)).signs
    assert size < 7 or set(signs.tolist()) == {-1.0, 1.0}
    expected = signs.unsqueeze(1) * hadamard_like(size).matrix()
    assert torch.allclose(random_rotation(size, np.random.default_rng(0)).matrix(), expected)
    if size & (size - 1) == 0:
        assert torch.allclose(hadamard_like(size).matrix().abs(), torch.tensor(size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["qwen2_vl", "internvl", "llama", "untied llama"])
def test_the_rotated_model_computes_the_same(kind: str, small: str, tiny_internvl: Path, samples: list[Sample]) -> None:
    makers: dict[str, Callable[[], LoadedModel]] = {
        "qwen2_vl": lambda: load_model(small, torch.float32),
        "internvl": lambda: load_model(str(tiny_internvl), torch.float32),
        "llama": tiny_llama,
        "untied llama": lambda: tiny_llama(tied=False),
    }
    loaded = makers[kind]()
    uneven_gains(loaded)
    encoded = encoded_for(loaded, samples)
    before = logits(loaded, encoded)
    stream: dict[str, Tensor] = {}
    last = [block for block in loaded.family.blocks(loaded.model) if block.group == "language"][-1]
    for step in ("plain", "rotated"):
        handle = last.module.register_forward_hook(lambda _m, _i, y, step=step: stream.update({step: y}))
        logits(loaded, encoded)
        handle.remove()
        if step == "plain":
            rotate_language_model(loaded, 3)
    after = logits(loaded, encoded)
    assert (after - before).norm() <= 1e-4 * before.norm()
    # it is the stream that has been rotated, by the rotation of this seed
    rotation = random_rotation(stream["plain"].shape[-1], np.random.default_rng(3)).matrix().float()
    assert torch.allclose(stream["plain"] @ rotation, stream["rotated"], atol=1e-3 * stream["plain"].abs().max())
    assert not torch.allclose(stream["plain"], stream["rotated"], atol=0.1)
    head, embedding = loaded.model.get_output_embeddings().weight, loaded.model.get_input_embeddings().weight
    tied = loaded.family.config.get_text_config().tie_word_embeddings
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    assert len(mixing_of(loaded.model)) == int(tied)  # a head of its own takes the last norm's gains
    again = makers[kind]()
    uneven_gains(again)
    rotate_language_model(again, 3)
    assert torch.equal(after, logits(again, encoded))


def test_outliers_of_the_stream_are_spread() -> None:
    loaded = tiny_llama()
    loaded.model.get_input_embeddings().weight.data[:, 5] *= 30
    encoded = encoded_for(loaded, [])
    peaks = []
    for seed in (None, 0):
        if seed is not None:
            rotate_language_model(loaded, seed)
        embedded = loaded.model.get_input_embeddings()(torch.from_numpy(encoded.input_ids)).detach()
        peaks.append(float((embedded.abs().amax(-1) / embedded.norm(dim=-1)).mean()))
    assert peaks[1] < 0.5 * peaks[0]


@pytest.mark.parametrize("change", ["layer norm", "offset gains", "extra norm", "other mlp"])
def test_other_decoders_are_refused_and_left_as_they_are(change: str) -> None:
    class OffsetNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(48))

        def forward(self, x: Tensor) -> Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + self.weight)

    loaded = tiny_llama()
    layer = loaded.model.model.layers[1]
    if change == "layer norm":
        layer.post_attention_layernorm = nn.LayerNorm(48)
    elif change == "offset gains":
        layer.input_layernorm = OffsetNorm()
    elif change == "extra norm":
        layer.pre_feedforward_layernorm = nn.RMSNorm(48)
    else:
        layer.mlp.extra_proj = nn.Linear(4, 4)
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    with pytest.raises(ModelError, match="cannot be rotated"):
        rotate_language_model(loaded, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight


def test_a_refused_model_leaves_no_unfinished_run(tmp_path: Path) -> None:
    loaded = load_model(str(write_small_llama(tmp_path / "model")))
    loaded.model.model.norm = nn.LayerNorm(64)
    recipe = make_recipe(method="quarot", modules=("language",))
    with pytest.raises(ModelError, match="cannot be rotated"):
        quantize(loaded, recipe, [Sample(None, "?", "!")], work=tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("kind", ["qwen2_vl", "internvl"])
def test_a_resumed_run_rotates_alike_and_the_checkpoint_is_bit_identical(
    kind: str, small: str, tiny_internvl: Path, tmp_path: Path
) -> None:
    source = small if kind == "qwen2_vl" else str(tiny_internvl)
    recipe = make_recipe(method="quarot", scheme="w4a8", modules=("language", "merger"), calibration={"samples": 4})
    whole, spec = quantize(source, recipe)
    save_quantized(whole, spec, tmp_path / "whole")
    with pytest.raises(KilledError):
        quantize(source, recipe, work=tmp_path / "work", progress=StopAfter(2))
    resumed, spec = quantize(source, recipe, work=tmp_path / "work", resume=True)
    save_quantized(resumed, spec, tmp_path / "resumed")
    for name in ("model.safetensors", "config.json", "recipe.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    again = load_quantized(tmp_path / "whole")
    before, after = whole.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    head, embedding = again.model.get_output_embeddings().weight, again.model.get_input_embeddings().weight
    assert head.data_ptr() == embedding.data_ptr()
    assert len(mixing_of(again.model)) == 1


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "quarot", "scheme": "w4a8"},
        {"method": "quarot", "scheme": "w4a8", "preset": "rtn"},
        {"method": "quarot", "scheme": "w3a16"},
        {"method": "qe", "scheme": "w4a8", "options": {"rotate": True}},
        {"method": "qe", "scheme": "w3a16", "budget": {"bits": 4}},
    ],
)
def test_the_quantized_rotated_model_stays_near_the_original(small: str, keys: dict[str, Any]) -> None:
    original = load_model(small, torch.float32)
    encoded = encoded_for(original, load_evaluation("demo")[:4])
    loaded, _ = quantize(small, make_recipe(calibration={"samples": 4}, **keys))
    assert len(mixing_of(loaded.model)) == 1
    if "budget" in keys:  # the rotation's matrix is inside it
        total, rotation = count_bits(loaded.model, {}).total, rotation_bits(loaded.model)
        assert rotation.scales == rotation.read == 8 * mixing_of(loaded.model)[0].nbytes > 0
        assert total.stored_bits <= 4 < total.stored_bits + rotation.scales / total.weights
    loaded.model.float()
    before = logits(original, encoded)
    assert 0 < (logits(loaded, encoded) - before).norm() < 0.25 * before.norm()


@pytest.mark.parametrize("change", ["shape", "place"])
def test_a_rotation_that_does_not_fit_is_a_damaged_checkpoint(change: str, small: str, tmp_path: Path) -> None:
    recipe = make_recipe(method="quarot", preset="rtn", calibration={"samples": 1})
    loaded, spec = quantize(small, recipe)
    save_quantized(loaded, spec, tmp_path / "rotated")
    file = tmp_path / "rotated" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(".norm.mixing.weight"))
    matrix = tensors.pop(name)
    tensors |= {name: matrix[:-1].clone()} if change == "shape" else {f"other.{name}": matrix}
    save_file(tensors, file, metadata={"format": "pt"})
    seal(tmp_path / "rotated")
    with pytest.raises(ArtifactError, match=r"The checkpoint .* is damaged"):
        load_quantized(tmp_path / "rotated")


@pytest.mark.parametrize(
    ("keys", "rotated"),
    [
        ({}, False),
        ({"options": {"rotate": True}}, True),
        ({"options": {"rotate": True}, "modules": ("visual",)}, False),  # the language model is left as it is
        ({"budget": {"bits": 6}}, True),
        ({"budget": {"bits": 6}, "options": {"rotate": False}}, False),
        ({"budget": {"bits": 6}, "modules": ("visual",)}, False),
    ],
)
def test_quant_experts_rotate_the_language_model_that_they_quantize(
    small: str, keys: dict[str, Any], rotated: bool
) -> None:
    loaded, _ = quantize(small, make_recipe(method="qe", calibration={"samples": 1}, **keys))
    assert len(mixing_of(loaded.model)) == int(rotated)
    if not rotated:
        original = load_model(small).model.get_decoder().norm.weight
        assert torch.equal(loaded.model.get_decoder().norm.weight, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rotation_multiplies_with_the_kronecker_product_of_its_factors(dtype: torch.dtype) -> None:
    rotation = random_rotation(48, np.random.default_rng(0))
    whole = rotation.signs.unsqueeze(1) * torch.kron(rotation.left, rotation.right)
    rows = torch.randn(2, 5, 48, dtype=dtype)
    torch.testing.assert_close(rotation(rows), rows @ whole.to(dtype))
    torch.testing.assert_close(rotation.matrix(), whole)
