"""LLM-QAT and DL-QAT: gradients, one layer alone, a whole model, and what is refused before any training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qe_edge import make_recipe, quantize_linear
from qe_edge.calibration.sources import load_samples
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid
from qe_edge.quantization import quantizer, whole_model
from qe_edge.quantization.quantizer import quantize
from qe_edge.quantization.whole_model import written_texts
from qe_edge.reconstruction.trained_weights import FreeWeight, LowRankWeight
from qe_edge.system.errors import ModelError, NumericalError, RecipeError
from tests.layers import correlated_layer
from tests.reference.dlqat import gradients, rounded
from tests.small_vlm import write_small_vlm

CALIBRATION = {"samples": 4}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_vlm(tmp_path_factory.mktemp("model") / "small"))


def test_low_rank_gradients_equal_the_reference() -> None:
    drawn = torch.Generator().manual_seed(0)
    weight, slope = (torch.randn(6, 20, generator=drawn) for _ in range(2))
    trained = LowRankWeight(weight, WeightGrid(3, PER_CHANNEL, symmetric=True), rank=2, seed=1)
    trained.up.data = torch.randn(6, 2, generator=drawn)
    trained.magnitude.data += 0.2 * torch.randn(6, 1, generator=drawn)
    arguments = [part.detach().double().numpy() for part in (weight, trained.up, trained.down, trained.magnitude[:, 0])]
    expected, inside = rounded(*arguments, 3)
    assert 0.02 < 1 - inside.mean() < 0.9
    found = trained.decoded()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(trained.stored().decode().numpy(), expected, rtol=1e-3)
    found.backward(slope)
    moved = trained.up, trained.down, trained.magnitude
    for parameter, wanted in zip(moved, gradients(*arguments, 3, slope.double().numpy()), strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy().reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_free_weights_get_their_gradient_through_the_rounding() -> None:
    weight, slope = torch.randn(4, 16), torch.randn(4, 16)
    trained = FreeWeight(weight, WeightGrid(4, PER_CHANNEL, symmetric=True))
    trained.decoded().backward(slope)
    assert trained.weight.grad is not None
    inner = weight.abs() < weight.abs().amax(1, keepdim=True)  # the largest moves the range too
    torch.testing.assert_close(trained.weight.grad[inner], slope[inner])
    torch.testing.assert_close(trained.stored().decode(), trained.decoded().detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("method", "scheme"), [("llmqat", "w3a8"), ("llmqat", "w4a16"), ("dlqat", "w3a8"), ("dlqat", "w3a16")]
)
def test_one_layer_is_trained_on_its_outputs(method: str, scheme: str) -> None:
    weight, x = correlated_layer(40, 64, 500)
    recipe = make_recipe(method=method, scheme=scheme, options={"rate": 0.005, "steps": 100})
    trained, again = (quantize_linear(weight, x, recipe) for _ in range(2))
    plain = quantize_linear(weight, x, make_recipe(method="rtn", scheme=scheme))
    target = x @ weight.T
    assert (trained(x) - target).norm() < 0.8 * (plain(x) - target).norm()
    assert torch.equal(trained.qweight, again.qweight)
    wild = make_recipe(method=method, scheme=scheme, options={"rate": 1.0, "steps": 3})  # which only does harm
    kept = quantize_linear(weight, x, wild)
    assert (kept(x) - target).norm() <= (plain(x) - target).norm() * 1.0001


def divergence(original: LoadedModel, quantized: LoadedModel) -> float:
    """Mean KL(original || quantized) on text tokens of calibration samples."""
    samples = load_samples("demo", CALIBRATION["samples"], 0)
    encoded = original.family.encode(original.processor, samples, answers=True)
    counted = torch.from_numpy(encoded.attention_mask.astype(bool) & ~encoded.image_mask)
    with torch.no_grad():
        exact, found = (
            loaded.model.float()(**loaded.family.torch_inputs(encoded)).logits[counted].log_softmax(-1)
            for loaded in (original, quantized)
        )
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize("method", ["llmqat", "dlqat"])
def test_a_model_comes_closer_to_its_own_predictions(small: str, method: str) -> None:
    options = {"steps": 10, "data": "calibration"}
    trained, plain = (
        quantize(small, make_recipe(method=name, scheme="w3a8", options=chosen, calibration=CALIBRATION))[0]
        for name, chosen in ((method, options), ("rtn", {}))
    )
    assert {name.split(".")[-1] for name in quantized_linears(trained.model)} >= {"q_proj", "down_proj"}
    original = load_model(small)
    assert divergence(original, trained) < 0.3 * divergence(original, plain)
    untouched = "model.language_model.norm.weight"
    assert torch.equal(trained.model.state_dict()[untouched], original.model.state_dict()[untouched])


def test_a_model_writes_its_own_data(small: str) -> None:
    loaded = load_model(small)
    loaded.model.float()
    texts = written_texts(loaded, count=5, length=16, batch=3, seed=0)
    again = written_texts(loaded, count=5, length=16, batch=3, seed=0)
    assert [text.input_ids.tolist() for text in texts] == [text.input_ids.tolist() for text in again]
    ids = np.concatenate([text.input_ids for text in texts])
    tokenizer = loaded.processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    assert not special & set(ids.flatten().tolist())
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.from_numpy(ids)).logits
    logits[..., sorted(special)] = -torch.inf
    likeliest = logits.argmax(-1).numpy()[:, :-1] == ids[:, 1:]
    assert likeliest[:, :4].all()
    assert not likeliest[:, 4:].all()


def test_generated_text_needs_no_samples_and_finished_blocks_no_training(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 2, "generated": 8, "length": 8, "rate": 0.01}
    one, two = (
        quantize(small, make_recipe(method="llmqat", options=options, calibration={"samples": count}), work=work)[0]
        for count, work in ((1, None), (2, tmp_path / "work"))
    )
    expected = two.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in one.model.state_dict().items())

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(quantizer, "train_model", never)
    recipe = make_recipe(method="llmqat", options=options, calibration={"samples": 2})
    resumed = quantize(small, recipe, work=tmp_path / "work", resume=True)[0]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.model.state_dict().items())


def test_what_cannot_be_trained_is_refused(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"reaches the language model alone\. .*data=calibration"):
        quantize(small, make_recipe(method="llmqat", modules=("language", "visual"), calibration=CALIBRATION))
    with pytest.raises(RecipeError, match="'dlqat' does not round the head"):
        quantize(small, make_recipe(method="dlqat", head="int4", calibration=CALIBRATION))
    distance = whole_model._distance
    monkeypatch.setattr(whole_model, "_distance", lambda *parts: distance(*parts) * torch.inf)
    with pytest.raises(NumericalError, match=r"not finite in step .*smaller option 'rate'"):
        quantize(small, make_recipe(method="dlqat", options={"steps": 1}, calibration=CALIBRATION))
    monkeypatch.setattr(whole_model, "LARGEST", 1000)
    with pytest.raises(ModelError, match=r"'dlqat' trains the whole model on the CPU, .*for example lsq"):
        quantize(small, make_recipe(method="dlqat", calibration=CALIBRATION))
