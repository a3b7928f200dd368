"""MBQ against its definition in float64, and that gradients reach it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qe_edge.calibration.modality import modality_ratios, speakers
from qe_edge.calibration.sensitivity import Sensitivity, output_gradients
from qe_edge.calibration.sources import load_samples
from qe_edge.calibration.statistics import StatisticsCollector
from qe_edge.layers.linear import QELinear
from qe_edge.methods.mbq import MBQ, MBQOptions
from qe_edge.models.loading import load_model
from qe_edge.numerics.schemes import get_scheme
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.errors import CalibrationError
from tests.layers import typed_layer
from tests.reference.mbq import mbq_losses


def problem_of_two_modalities(scheme: str, ratio: float) -> tuple[LinearProblem, np.ndarray]:
    """Image tokens and answer tokens are large in different channels, so no one scale is best for both."""
    weight, x = typed_layer(48, 64, 400)
    rng = np.random.default_rng(1)
    kinds = rng.choice(3, 400, p=[0.2, 0.6, 0.2]).astype(np.int8)
    x[kinds == 1, :8] *= 6
    x[kinds == 2, 32:40] *= 12
    method = MBQ(MBQOptions())
    request = method.request(48, 64)
    assert request is not None
    collector = StatisticsCollector("layer", 64, [weight], request, 0)
    collector.update(x, torch.from_numpy(kinds))
    return LinearProblem("layer", weight, get_scheme(scheme), collector.finish()[0], 0, None, ratio), kinds


@pytest.mark.parametrize("ratio", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("scheme", ["w4a8", "w4a6", "w3a16"])
def test_the_search_finds_the_least_balanced_error(scheme: str, ratio: float) -> None:
    problem, kinds = problem_of_two_modalities(scheme, ratio)
    result = MBQ(MBQOptions()).quantize(problem)
    grid = problem.scheme.weight
    group = None if grid.group_size < 0 else grid.resolve_group(64)
    tokens = problem.measured().tokens.astype(np.float64)
    losses = mbq_losses(
        problem.weight.double().numpy(), tokens, kinds, ratio, (grid.bits, group, grid.symmetric),
        problem.scheme.activation_bits,
    )  # fmt: skip
    counted = kinds > 0
    error = (QELinear(result)(torch.from_numpy(problem.measured().tokens)).double().numpy()) - (
        tokens @ problem.weight.double().numpy().T
    )
    weights = np.where(kinds == 1, ratio, 1.0)[counted]
    found = (np.abs(error[counted]).sum(1) @ weights) / (counted.sum() * 48)
    assert found == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < losses[0]


def test_the_ratio_decides_the_scale() -> None:
    scales = []
    for ratio in (0.0, 1e3):
        result = MBQ(MBQOptions()).quantize(problem_of_two_modalities("w3a16", ratio)[0])
        assert result.inv_omega is not None
        scales.append(result.inv_omega)
    assert not torch.equal(*scales)


def test_tokens_of_unknown_kind_all_count() -> None:
    problem, _ = problem_of_two_modalities("w3a16", 1.0)
    kinds = np.zeros_like(problem.measured().token_kind)
    unknown = replace(problem, statistics=replace(problem.measured(), token_kind=kinds))
    every = replace(problem, statistics=replace(problem.measured(), token_kind=kinds + 2))
    first, second = (MBQ(MBQOptions()).quantize(one).inv_omega for one in (unknown, every))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_ratios_speak_per_part_and_are_floored_at_the_median(small: str) -> None:
    loaded = load_model(small)
    blocks = loaded.family.blocks(loaded.model)
    language = [block for block in blocks if block.group == "language"]
    layers = speakers(language[0])
    ends = {name.rpartition(".")[2]: (part, speaker.rpartition(".")[2]) for name, (part, speaker) in layers.items()}
    assert ends["q_proj"] == ends["o_proj"] == ("attention", "o_proj")
    assert ends["gate_proj"] == ends["down_proj"] == ("mlp", "down_proj")

    def one(vision: float, answer: float = 1.0) -> Sensitivity:
        return Sensitivity(vision, answer, 0.0, np.zeros(1, np.float32), 1)

    first, second = language[0].name, language[1].name
    measured = {
        f"{first}.self_attn.o_proj": one(0.1),
        f"{second}.self_attn.o_proj": one(0.5),
        f"{first}.mlp.down_proj": one(4.0, 2.0),
        f"{second}.mlp.down_proj": one(1.0, 2.0),
    }
    ratios = modality_ratios(blocks, measured)
    assert ratios[f"{first}.self_attn.q_proj"] == pytest.approx(0.3)  # below the median of 0.1 and 0.5
    assert ratios[f"{second}.self_attn.k_proj"] == pytest.approx(0.5)
    assert ratios[f"{first}.mlp.up_proj"] == pytest.approx(2.0)
    assert ratios[f"{second}.mlp.gate_proj"] == pytest.approx(1.25)
    assert not any("visual" in name for name in ratios)
    with pytest.raises(CalibrationError, match="no calibration sample has an answer"):
        modality_ratios(blocks, {name: one(1.0, 0.0) for name in measured})


def test_measured_ratios_reach_the_method(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}
    original = MBQ.quantize

    def keep(self: MBQ, problem: LinearProblem) -> object:
        seen[problem.name] = problem.modality_ratio
        return original(self, problem)

    monkeypatch.setattr(MBQ, "quantize", keep)
    recipe = make_recipe(method="mbq", modules=("language", "visual"), calibration={"samples": 4})
    loaded, _ = quantize(small, recipe)
    plain = load_model(small)
    blocks = plain.family.blocks(plain.model)
    encoded = plain.family.encode(plain.processor, load_samples("demo", 4, 0), answers=True)
    language = [block for block in blocks if block.group == "language"]
    names = [speaker for block in language for _, speaker in speakers(block).values()]
    expected = modality_ratios(blocks, output_gradients(plain, [encoded], names))
    assert len(set(seen.values())) > 2
    for name, ratio in seen.items():
        assert ratio == pytest.approx(expected.get(name, 1.0), rel=1e-4)

    class StoppedError(Exception):
        pass

    def stop(self: MBQ, problem: LinearProblem) -> object:
        if "layers.1" in problem.name:
            raise StoppedError
        return original(self, problem)

    monkeypatch.setattr(MBQ, "quantize", stop)
    with pytest.raises(StoppedError):
        quantize(small, recipe, work=tmp_path / "work")
    monkeypatch.setattr(MBQ, "quantize", original)
    resumed, _ = quantize(small, recipe, work=tmp_path / "work", resume=True)
    after = resumed.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in loaded.model.state_dict().items())
