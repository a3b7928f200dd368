"""LoaQ sees both models as they are, and its weight is the one whose output is closest to the original's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge import make_recipe
from qe_edge.layers.linear import quantized_linears
from qe_edge.methods.loaq import LoaQ, matched_weight
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.quantization.job import encoded_batches, make_job
from qe_edge.quantization.quantizer import quantize
from qe_edge.reconstruction.problem import Drift, LinearProblem
from qe_edge.system.errors import RecipeError
from tests.small_vlm import write_small_vlm
from tests.stopping import resumed_after_a_stop

CALIBRATION = {"samples": 3}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_vlm(tmp_path_factory.mktemp("model") / "small"))


def inputs_of(loaded: LoadedModel, names: list[str]) -> dict[str, Tensor]:
    """What modules read on the calibration samples `[tokens, features]`, without padding, in float64."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    mask = torch.ones(0)

    def keep(name: str) -> object:
        return lambda _module, inputs: found[name].append(inputs[0][mask].double())

    handles = [loaded.model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    for batch in encoded_batches(loaded, make_job("demo", make_recipe(calibration=CALIBRATION)).samples):
        mask = torch.from_numpy(batch.attention_mask).bool()
        with torch.no_grad():
            loaded.model(**loaded.family.torch_inputs(batch))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_the_weight_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    read, weight = torch.randn(300, 12).double(), torch.randn(5, 12)
    x, apart = read + 0.3 * torch.randn(300, 12), 0.4 * torch.randn(300, 5).double()
    gram = read.T @ read / 300
    drift = Drift((x - read).T @ read / 300, apart.T @ read / 300)
    target = x @ weight.double().T + apart
    for damping in (0.0, 0.1):  # which pulls towards the original weight
        rows = torch.cat((read / 300**0.5, (damping * gram.diagonal().mean()) ** 0.5 * torch.eye(12)))
        wanted = torch.cat((target / 300**0.5, (damping * gram.diagonal().mean()) ** 0.5 * weight.double().T))
        expected = torch.linalg.lstsq(rows, wanted).solution.T
        found = matched_weight(weight, gram, drift, (1.0, 1.0), damping)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(matched_weight(weight, gram, drift, (0.0, 0.0), 0.1), weight)
    assert torch.equal(matched_weight(weight, gram * 0, drift, (1.0, 1.0), 0.1), weight)


@pytest.mark.parametrize(
    ("name", "norm"),
    [("self_attn.o_proj", "input_layernorm"), ("mlp.down_proj", "post_attention_layernorm"), ("mlp.up_proj", None)],
)
def test_a_layer_is_given_what_both_models_have_there(
    small: str, name: str, norm: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems: dict[str, LinearProblem] = {}
    work = LoaQ.quantize
    monkeypatch.setattr(LoaQ, "quantize", lambda self, problem: work(self, problems.setdefault(problem.name, problem)))
    found = quantize(small, make_recipe(method="loaq", scheme="w3a8", calibration=CALIBRATION))[0]
    original = load_model(small)
    prefix = next(key for key in problems if key.endswith(f"layers.1.{name}")).removesuffix(name)
    names = [prefix + part for part in (name, norm) if part]
    for loaded in (found, original):
        loaded.model.float()
    (x, *r), (read, *s) = (list(inputs_of(loaded, names).values()) for loaded in (original, found))
    weights = torch.ones(len(x), 1).double()
    if norm:
        state = r[0] + original.model.get_submodule(names[0])(x.float()).double()
        weights = 1 / state.square().mean(1, keepdim=True)
    problem = problems[names[0]]
    assert problem.drift is not None
    for seen, expected in (
        (torch.from_numpy(np.asarray(problem.gram())), read.T @ (weights * read)),
        (problem.drift.inputs, (x - read).T @ (weights * read)),
        (problem.drift.residual, (r[0] - s[0]).T @ (weights * read) if norm else None),
    ):
        if expected is None:
            assert seen is None
        else:
            assert seen is not None
            assert (seen - expected / len(x)).norm() < 1e-3 * (expected / len(x)).norm()


def test_the_model_is_closer_to_the_original_than_with_gptq(small: str) -> None:
    last = "model.language_model.norm"
    original = load_model(small)
    original.model.float()
    target = inputs_of(original, [last])[last]
    lost = {}
    for method, options in (("loaq", {}), ("gptq", {}), ("loaq", {"inputs": 0, "residual": 0})):
        recipe = make_recipe(method=method, scheme="w3a16", options=options, calibration=CALIBRATION, flow="sequential")
        loaded = quantize(small, recipe)[0]
        loaded.model.float()
        lost[method, len(options)] = float((inputs_of(loaded, [last])[last] - target).norm())
    assert lost["loaq", 0] < 0.9 * lost["gptq", 0]
    assert lost["loaq", 0] < 0.9 * lost["loaq", 2]


def test_every_part_of_a_model_and_a_resumed_run(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = ("language", "visual", "merger")
    recipe = make_recipe(method="loaq", modules=modules, calibration=CALIBRATION)
    whole, _ = quantize(small, recipe)
    assert all(any(part in name for name in quantized_linears(whole.model)) for part in ("visual", "merger", "layers"))
    resumed = resumed_after_a_stop(LoaQ, small, recipe, tmp_path / "work", monkeypatch)
    after = resumed.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.model.state_dict().items())


def test_quant_experts_match_outputs_too(small: str) -> None:
    options = {"match": True, "shared_rank": 0, "experts": 0, "clip": False, "rotate": False}
    recipes = [
        make_recipe(method=method, scheme="w3a16", options=chosen, calibration=CALIBRATION)
        for method, chosen in (("qe", options), ("loaq", {}))
    ]
    own, other = (quantized_linears(quantize(small, recipe)[0].model) for recipe in recipes)
    for name, layer in own.items():
        assert (layer.codes() != other[name].codes()).float().mean() < 0.01
    with pytest.raises(RecipeError, match=r"not by gradients .*Leave one of the two out"):
        make_recipe(method="qe", options={"match": True, "token_power": 1.0})


def test_inside_a_budget_the_drift_is_scaled_like_the_outputs(small: str) -> None:
    recipe = make_recipe(method="qe", options={"match": True}, budget={"bits": 4.5}, calibration=CALIBRATION)
    assert quantized_linears(quantize(small, recipe)[0].model)
    torch.manual_seed(0)
    weight, read, factors = torch.randn(5, 12), torch.randn(40, 12).double(), torch.tensor([1.0, 2.0, 0.5, 1.0, 4.0])
    drift, gram = Drift(torch.randn(12, 12).double(), torch.randn(5, 12).double()), read.T @ read / 40
    plain = matched_weight(weight, gram, drift, (1.0, 1.0), 0.01)
    scaled = matched_weight(weight * factors[:, None], gram, drift.scaled(factors), (1.0, 1.0), 0.01)
    torch.testing.assert_close(scaled, plain * factors[:, None])
