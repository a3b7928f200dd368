"""Gradients weigh the tokens of VLMQ's Hessian, and nothing else differs from GPTQ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.calibration.sensitivity import output_gradients
from qe_edge.calibration.sources import load_samples
from qe_edge.layers.linear import quantized_linears
from qe_edge.methods.vlmq import VLMQ
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.quantization.quantizer import quantize
from qe_edge.reconstruction.token_weights import gradient_weights
from tests.layers import correlated_layer
from tests.small_vlm import write_small_vlm


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_vlm(tmp_path_factory.mktemp("model") / "small"))


def quantized(small: str, method: str, **options: object) -> LoadedModel:
    recipe = make_recipe(method=method, scheme="w3a16", options=options, calibration={"samples": 2})
    return quantize(small, recipe)[0]


def test_tokens_alike_are_gptq_and_weighed_ones_are_not(small: str) -> None:
    plain, alike, weighed = (
        quantized_linears(quantized(small, method, **options).model)
        for method, options in (("gptq", {}), ("vlmq", {"evenness": 1}), ("vlmq", {}))
    )
    changed = {name for name, layer in weighed.items() if not torch.equal(layer.qweight, plain[name].qweight)}
    for name, layer in alike.items():
        assert (layer.qweight != plain[name].qweight).float().mean() < 0.01
    assert len(changed) > 0.8 * len(plain)


def test_weights_are_of_the_tokens_that_the_layer_reads(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    monkeypatch.setattr(VLMQ, "token_weights", lambda _self, energy: seen.append(energy) or np.ones(len(energy)))
    quantized(small, "vlmq")
    loaded = load_model(small)
    name = next(name for name in dict(loaded.model.named_modules()) if name.endswith("layers.0.self_attn.q_proj"))
    siblings = [name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
    encoded = loaded.family.encode(loaded.processor, load_samples("demo", 2, 0), answers=True)
    found = output_gradients(loaded, [encoded], siblings, loss="predictions")
    wanted = sum(found[sibling].token_energy for sibling in siblings)
    assert any(len(energy) == len(wanted) and np.allclose(energy, wanted, rtol=1e-3) for energy in seen)


def test_one_layer_alone_has_no_gradients_and_is_gptq() -> None:
    weight, x = correlated_layer(16, 64, 300)
    own, other = (quantize_linear(weight, x, make_recipe(method=method)) for method in ("vlmq", "gptq"))
    assert torch.equal(own.qweight, other.qweight)


def test_a_loss_that_does_not_depend_on_a_layer_weighs_its_tokens_alike() -> None:
    assert gradient_weights(np.zeros(3), 1, 0.1).tolist() == [1, 1, 1]
    assert gradient_weights(np.array([1.0, 9.0]), 2, 0.0).tolist() == [0.2, 1.8]


def test_a_stopped_run_reads_its_weights_again(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(method="vlmq", calibration={"samples": 2})
    whole, _ = quantize(small, recipe)
    original = VLMQ.quantize

    def stop(self: VLMQ, problem: object) -> object:
        if "layers.1" in problem.name:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return original(self, problem)  # type: ignore[arg-type]

    monkeypatch.setattr(VLMQ, "quantize", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(small, recipe, work=tmp_path / "work")
    monkeypatch.setattr(VLMQ, "quantize", original)
    resumed, _ = quantize(small, recipe, work=tmp_path / "work", resume=True)
    after = resumed.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.model.state_dict().items())
