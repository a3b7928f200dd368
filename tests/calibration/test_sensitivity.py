"""Gradient sensitivities against plain autograd and finite differences, and token kinds in the sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge.calibration import sensitivity
from qe_edge.calibration.sensitivity import (
    fisher_factor,
    labels_of,
    load_sensitivities,
    output_gradients,
    predicts_tokens,
    save_sensitivities,
    token_kinds,
)
from qe_edge.calibration.statistics import StatisticsCollector, StatisticsRequest
from qe_edge.models.family import Encoded, Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.system.errors import ArtifactError, CalibrationError, ModelError
from tests.small_vlm import write_small_vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_vlm(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(scope="module")
def batches(folder: str) -> list[Encoded]:
    from qe_edge.calibration.sources import read_jsonl
    from qe_edge.demo import calibration_path

    samples = read_jsonl(calibration_path())[:5]
    samples[1] = replace(samples[1], answer=None)  # its loss is over all of its text
    samples[4] = Sample(None, "is it?", "no")
    loaded = load_model(folder)
    parts = (samples[:2], samples[2:4], samples[4:])  # the last batch has no picture
    return [loaded.family.encode(loaded.processor, part, answers=True) for part in parts]


def linears(loaded: LoadedModel) -> list[str]:
    return [
        f"{block.name}.{name}"
        for block in loaded.family.blocks(loaded.model)
        for name, module in block.module.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


@pytest.mark.parametrize("room", [0, 60_000, 1 << 40])
def test_weights_that_stay_on_the_device_change_nothing(
    room: int, folder: str, batches: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks, some of them, or none stay from batch to batch."""
    kept: list[int] = []

    class Counting(sensitivity.BlockWeights):
        def __init__(self, loaded: LoadedModel, device: torch.device) -> None:
            super().__init__(loaded, device, room)

        def _keep(self, name: str, tensors: list[Tensor]) -> None:
            super()._keep(name, tensors)
            kept.append(len(self._kept))

    plain, other = (load_model(folder, torch.bfloat16) for _ in range(2))
    names = linears(plain)
    expected = output_gradients(plain, batches, names)
    monkeypatch.setattr(sensitivity, "BlockWeights", Counting)
    found = output_gradients(other, batches, names)
    blocks = len(other.family.blocks(other.model))
    assert max(kept) == blocks if room > 60_000 else max(kept) < blocks
    for name in names:
        assert found[name].energy == expected[name].energy
        np.testing.assert_array_equal(found[name].channels, expected[name].channels)
    for one, same in zip(plain.model.parameters(), other.model.parameters(), strict=True):
        assert one.dtype == same.dtype == torch.bfloat16
        assert torch.equal(one, same)


def plain_loss(loaded: LoadedModel, encoded: Encoded) -> Tensor:
    """Cross-entropy of the answers, or of all text, one token after the other."""
    inputs = loaded.family.torch_inputs(encoded)
    likelihood = loaded.model(**inputs, use_cache=False).logits.log_softmax(-1)
    loss = torch.zeros(())
    for row, ids in enumerate(encoded.input_ids):
        answered = encoded.answer_mask[row].any()
        for position in range(1, len(ids)):
            if not encoded.attention_mask[row, position - 1] or encoded.image_mask[row, position]:
                continue
            if encoded.answer_mask[row, position] or not answered:
                loss = loss - likelihood[row, position - 1, ids[position]]
    return loss


def plain_gradients(loaded: LoadedModel, batches: list[Encoded], names: list[str]) -> dict[str, list[Tensor]]:
    """Autograd through the whole model at once, outputs retained."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for encoded in batches:
        outputs: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor, into: dict[str, Tensor] = outputs) -> None:
            into[name] = output

        modules = dict(loaded.model.named_modules())
        handles = [modules[name].register_forward_hook(lambda _m, _i, y, name=name: keep(name, y)) for name in names]
        loss = plain_loss(loaded, encoded)
        for handle in handles:
            handle.remove()
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            found[name].append(gradient)
    return found


def replaced(loaded: LoadedModel) -> list[str]:
    """Modules with a forward of their own, as the family gives its model one, or with hooks."""
    return [name for name, one in loaded.model.named_modules() if "forward" in one.__dict__ or one._forward_hooks]


def test_sensitivities_equal_plain_autograd(folder: str, batches: list[Encoded]) -> None:
    loaded = load_model(folder)  # bfloat16: blocks are converted one by one, and back
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    names, own = linears(loaded), replaced(loaded)
    found = output_gradients(loaded, batches, names)
    assert list(found) == names
    for name, tensor in loaded.model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in loaded.model.parameters())
    assert replaced(loaded) == own

    whole = load_model(folder, torch.float32)
    for name, gradients in plain_gradients(whole, batches, names).items():
        one = found[name]
        if "visual" in name:
            rows = torch.cat([gradient.reshape(-1, gradient.shape[-1]) for gradient in gradients])
            image, answer = rows, rows[:0]
        else:
            flat = [
                (gradient[torch.from_numpy(b.attention_mask).bool()], token_kinds(b)[b.attention_mask.astype(bool)])
                for gradient, b in zip(gradients, batches, strict=True)
            ]
            rows = torch.cat([part for part, _ in flat])
            kinds = np.concatenate([part for _, part in flat])
            image, answer = rows[kinds == 1], rows[kinds == 2]
        assert one.tokens == len(rows)
        np.testing.assert_allclose(one.channels, rows.square().mean(0), rtol=2e-3, atol=1e-3 * one.channels.max())
        assert one.energy == pytest.approx(float(rows.square().sum()) / rows.shape[1] / 5, rel=1e-3)
        by_token = rows.square().sum(1).numpy()
        np.testing.assert_allclose(one.token_energy, by_token, rtol=5e-3, atol=1e-3 * by_token.max())
        assert one.vision == pytest.approx(float(image.abs().mean()), rel=1e-3)
        assert one.answer == (pytest.approx(float(answer.abs().mean()), rel=1e-3) if len(answer) else 0)


def test_sensitivities_equal_finite_differences(folder: str, batches: list[Encoded]) -> None:
    """A constant added to one output channel changes the loss by the sum of its gradients."""
    loaded = load_model(folder, torch.float32)
    name = next(name for name in linears(loaded) if name.endswith("layers.0.mlp.down_proj"))
    module = dict(loaded.model.named_modules())[name]
    gradient = plain_gradients(loaded, batches[:1], [name])[name][0]
    step, channel = 2e-2, int(gradient.sum((0, 1)).abs().argmax())
    losses = []
    for sign in (1, -1):
        shift = torch.zeros(gradient.shape[-1])
        shift[channel] = sign * step
        handle = module.register_forward_hook(lambda _m, _i, y, shift=shift: y + shift)
        with torch.no_grad():
            losses.append(plain_loss(loaded, batches[0]))
        handle.remove()
    assert float(losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient[..., channel].sum()), rel=0.03)


def test_a_part_of_the_layers_gives_the_same_numbers(folder: str, batches: list[Encoded]) -> None:
    loaded = load_model(folder)
    names = linears(loaded)
    some = [names[-1], next(name for name in names if "layers.0" in name)]
    every, few = output_gradients(loaded, batches, names), output_gradients(loaded, batches, some)
    assert {name: few[name].energy for name in some} == {name: every[name].energy for name in some}


def test_fisher_factors_have_the_covariance_of_the_logits() -> None:
    logits = torch.tensor([[2.0, 0.5, -1.0, 0.0]])
    drawn = fisher_factor(logits.expand(200_000, 4), torch.Generator().manual_seed(0)).double()
    likely = logits[0].double().softmax(0)
    expected = likely.diag() - likely.outer(likely)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), expected, rtol=0, atol=2e-3)


def test_gradients_of_predictions_are_of_the_divergence(folder: str, batches: list[Encoded]) -> None:
    """Noise at a layer's output costs what the energy of its gradients says."""
    loaded = load_model(folder, torch.float32)
    name = next(name for name in linears(loaded) if name.endswith("layers.1.mlp.down_proj"))
    draws = [output_gradients(loaded, batches[:1], [name], loss="predictions", seed=seed)[name] for seed in range(40)]
    samples, outputs = len(batches[0].input_ids), len(draws[0].channels)
    energy = float(np.mean([one.energy for one in draws]))
    labels = torch.from_numpy(labels_of(batches[0]))[:, 1:]
    module = dict(loaded.model.named_modules())[name]
    generator, size, found = torch.Generator().manual_seed(0), 1e-2, []

    def predictions() -> Tensor:
        with torch.no_grad():
            inputs = loaded.family.torch_inputs(batches[0])
            return loaded.model(**inputs, use_cache=False).logits[:, :-1][labels].double().log_softmax(-1)

    before = predictions()
    for _ in range(40):
        handle = module.register_forward_hook(lambda _m, _i, y: y + size * torch.randn(y.shape, generator=generator))
        after = predictions()
        handle.remove()
        found.append(float((before.exp() * (before - after)).sum()) / samples)
    assert 2 * np.mean(found) == pytest.approx(energy * size**2 * outputs, rel=0.15)


def test_what_cannot_be_measured_is_an_error(
    folder: str, batches: list[Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(folder)
    with pytest.raises(ModelError, match="no linear layer"):
        output_gradients(loaded, batches, ["lm_head"])
    name = linears(loaded)[-1]
    empty = [replace(b, answer_mask=b.answer_mask & False, image_mask=b.image_mask | True) for b in batches]
    with pytest.raises(CalibrationError, match="token to predict"):
        output_gradients(loaded, empty, [name])
    monkeypatch.setattr(loaded.model, "get_output_embeddings", lambda: None)
    assert not predicts_tokens(loaded)
    with pytest.raises(ModelError, match="predicts no tokens"):
        output_gradients(loaded, batches, [name])


def test_labels_are_the_answer_or_else_all_text(batches: list[Encoded]) -> None:
    labels = labels_of(batches[0])
    assert (labels[0] == batches[0].answer_mask[0]).all()
    text = batches[0].attention_mask[1].astype(bool) & ~batches[0].image_mask[1]
    assert labels[1].sum() == text.sum() - 1  # nothing predicts the first token
    assert not (labels[1] & ~text).any()


def test_sensitivities_survive_a_file(folder: str, batches: list[Encoded], tmp_path: Path) -> None:
    loaded = load_model(folder)
    found = output_gradients(loaded, batches, linears(loaded)[:2])
    path = tmp_path / "gradients.safetensors"
    save_sensitivities(path, found)
    again = load_sensitivities(path)
    for name, one in found.items():
        assert replace(again[name], channels=one.channels, token_energy=one.token_energy) == one
        assert (again[name].channels == one.channels).all()
        assert (again[name].token_energy == one.token_energy).all()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError):
        load_sensitivities(path)


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_token_kinds_follow_their_tokens_whatever_the_chunks(chunk: int) -> None:
    kinds = torch.from_numpy(np.random.default_rng(0).integers(0, 3, 300).astype(np.int8))
    tokens = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = kinds
    tokens[5] = float("nan")
    collector = StatisticsCollector("layer", 4, [torch.zeros(2, 4)], StatisticsRequest(gram=False, tokens=64), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qe_edge.calibration.statistics.MAX_BAD_TOKENS", 0.5)
        for start in range(0, 300, chunk):
            collector.update(tokens[start : start + chunk], kinds[start : start + chunk])
        found = collector.finish()[0]
    assert (found.token_kind == found.tokens[:, 0]).all()
    assert set(found.token_kind) == {0, 1, 2}
    places = [int((tokens.numpy() == token).all(1).argmax()) for token in found.tokens]
    assert (tokens.numpy()[places] == found.tokens).all()
    assert places == sorted(places)


def test_the_quantizer_says_what_its_tokens_are(folder: str) -> None:
    from qe_edge.calibration.statistics import InputStatistics
    from qe_edge.methods.rtn import RoundToNearest
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.recipes.recipe import make_recipe

    seen: dict[str, InputStatistics] = {}
    original: Callable = RoundToNearest.quantize

    def quantize_and_keep(self: RoundToNearest, problem: object) -> object:
        seen[problem.name] = problem.statistics
        return original(self, problem)

    recipe = make_recipe(method="rtn", modules=("language", "visual", "merger"), calibration={"samples": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RoundToNearest, "quantize", quantize_and_keep)
        patch.setattr(RoundToNearest, "request", lambda *_: StatisticsRequest(gram=False, tokens=10**6))
        loaded, _ = quantize(folder, recipe)
    from qe_edge.calibration.sources import load_samples

    encoded = loaded.family.encode(loaded.processor, load_samples("demo", 3, 0), answers=True)
    valid = encoded.attention_mask.astype(bool)
    for name, statistics in seen.items():
        if "language" in name:
            assert (statistics.token_kind == token_kinds(encoded)[valid]).all()
        else:
            assert (statistics.token_kind == 1).all()
            assert len(statistics.token_kind) > 0
