"""A layer on a device is computed by torch alone: its results are those of the CPU's way, up to rounding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qe_edge
from qe_edge.budget.model import AdapterSize, Choice
from qe_edge.calibration.statistics import StatisticsCollector, StatisticsRequest, collect_statistics
from qe_edge.layers.linear import QELinear, QuantizedLinear
from qe_edge.methods.base import Method
from qe_edge.numerics.grids import WeightGrid
from qe_edge.reconstruction.directions import ErrorSpace, filled, krylov_directions, orthonormal, top_eigenvectors
from qe_edge.reconstruction.gptq import Hessian, gptq_round
from qe_edge.reconstruction.packed_factors import pack_correction
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.device import fitting
from qe_edge.system.errors import ResourceError

WITHIN = 0.02  # of an error
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tokens_of_kinds(count: int, width: int, kinds: int = 4) -> Tensor:
    """Tokens of several kinds, each with large channels of its own."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    tokens = torch.randn(count, width, generator=generator) @ mixing
    kind = torch.randint(kinds, (count,), generator=generator)
    large = 1 + 9 * (torch.arange(width) % 16 == kind.unsqueeze(1)).float()
    return tokens * large


def problem_of(method: Method, scheme: str, shape: tuple[int, int]) -> tuple[LinearProblem, LinearProblem]:
    """The same layer for the CPU's way and for a device's."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[1] ** 0.5
    request = method.request(*shape)
    assert request
    statistics = collect_statistics("layer", weight, tokens_of_kinds(3000, shape[1]), request, 0)
    recipe = qe_edge.make_recipe(method="rtn", scheme=scheme)
    here = LinearProblem("layer", weight, recipe.get_scheme(), statistics, 0)
    assert statistics.gram is not None
    there = replace(
        statistics, gram=torch.from_numpy(statistics.gram.copy()), tokens=torch.from_numpy(statistics.tokens)
    )
    return here, replace(here, statistics=there)


def error_of(result: QuantizedLinear, problem: LinearProblem) -> float:
    """Mean square error of the layer's output on its tokens."""
    tokens = tokens_of_kinds(3000, problem.weight.shape[1])
    with torch.no_grad():
        return float((QELinear(result)(tokens) - tokens @ problem.weight.T).square().mean())


SHAPES = [(96, 160), (160, 96), (640, 576)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"adapter_dtype": "int4"},
    {"expert_weighting": "conditional_mean", "router": "triangle"},
    {"assignment": "modality", "refine": "all", "refine_epochs": 1, "refine_iterations": 5},
    {"rounding": "awq"},
    {"rounding": "nearest"},
    {"experts": 0, "em_steps": 0, "adapter_dtype": "float16"},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
@pytest.mark.parametrize("method", ["qe", "gptq", "quarot"])
def test_both_ways_leave_the_same_error(method: str, scheme: str, shape: tuple[int, int]) -> None:
    chosen = qe_edge.make_recipe(method=method, scheme=scheme).build_method()
    assert chosen.on_device
    here, there = problem_of(chosen, scheme, shape)
    assert error_of(chosen.quantize(there), there) == pytest.approx(error_of(chosen.quantize(here), here), rel=WITHIN)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
def test_every_option_has_both_ways(options: dict[str, Any]) -> None:
    chosen = qe_edge.make_recipe(method="qe", scheme="w4a8", options=options).build_method()
    here, there = problem_of(chosen, "w4a8", (192, 256))
    assert error_of(chosen.quantize(there), there) == pytest.approx(error_of(chosen.quantize(here), here), rel=WITHIN)


@pytest.mark.parametrize("shape", [(192, 256), (320, 256)])
def test_both_ways_offer_the_same_to_a_budget(shape: tuple[int, int]) -> None:
    chosen = qe_edge.make_recipe(method="qe", scheme="w4a8", budget={"bits": 4.5}).build_method()
    here, there = (chosen.candidates(problem) for problem in problem_of(chosen, "w4a8", shape))
    found = {(one.choice, one.stored): one.loss for one in there}
    shared = [(one.loss, found[one.choice, one.stored]) for one in here if (one.choice, one.stored) in found]
    assert len(shared) > 0.9 * len(here)
    for mine, other in shared:
        assert other == pytest.approx(mine, rel=WITHIN)


def test_a_choice_of_a_budget_is_kept_on_a_device() -> None:
    chosen = qe_edge.make_recipe(method="qe", scheme="w4a8").build_method()
    _, there = problem_of(chosen, "w4a8", (192, 256))
    result = chosen.quantize(there.given(Choice(AdapterSize(8, 8, 4, 4), 8, WeightGrid(3, 64))))
    assert result.weight.bits == 3
    assert result.adapters is not None
    assert (result.adapters.num_experts, result.adapters.down.dtype) == (4, torch.uint8)


@pytest.mark.parametrize("group", [-1, 16, 32, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_at_once_get_the_codes_of_columns_in_turn(group: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    weight, tokens, grid = torch.randn(48, 192), tokens_of_kinds(500, 192), WeightGrid(3, group, symmetric)
    gram = (tokens.T @ tokens / 500).double()
    for clip in (False, True):
        here, there = (gptq_round(weight, matrix, grid, 0.01, clip=clip) for matrix in (gram.numpy(), gram))
        assert (here.codes == there.codes).float().mean() > 0.99


@pytest.mark.parametrize("spread", [0.0, 1.5, 3.0])
def test_directions_on_a_device_leave_hardly_more_than_eigenvectors(spread: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(900, 700) * torch.exp(spread * torch.randn(700))
    covariance = rows.T @ rows / 900
    exact, found = top_eigenvectors(covariance.double().numpy(), 48), top_eigenvectors(covariance, 48).numpy()
    total, captured = (float(np.trace(each.T @ covariance.double().numpy() @ each)) for each in (exact, found))
    left = float(covariance.double().trace()) - total
    assert total - captured <= 3e-3 * left + 1e-5 * total
    np.testing.assert_allclose(found.T @ found, np.eye(48), atol=1e-5)


def test_directions_of_nothing_are_numbers() -> None:
    nothing = torch.zeros(512, 512)
    assert torch.isfinite(krylov_directions(lambda block: nothing @ block, nothing[None, :, :24], 16, 3)).all()


@pytest.mark.parametrize("steps", [3, 5])
def test_several_matrices_are_solved_at_once(steps: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 500, 400) * torch.exp(torch.randn(400))
    covariances = rows.mT @ rows / 500
    start = filled(torch.zeros(3, 400, 0), 40)
    found = krylov_directions(lambda block: covariances @ block, start, 32, steps)
    for covariance, directions in zip(covariances.double(), found, strict=True):
        most = float(torch.linalg.eigvalsh(covariance)[-32:].sum())
        assert float((directions * (covariance @ directions)).sum()) == pytest.approx(most, rel=1e-2)


def test_columns_are_orthonormal_however_steep_they_are() -> None:
    torch.manual_seed(0)
    block = torch.randn(400, 24) * torch.logspace(0, -5, 24)
    space = orthonormal(torch.randn(400, 16))
    found = torch.cat((space, orthonormal(block, space)), dim=1).double()
    torch.testing.assert_close(found.T @ found, torch.eye(40, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(96, 160), (300, 96)])
def test_a_space_on_a_device_measures_the_same(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    error, tokens = torch.randn(shape), tokens_of_kinds(400, shape[1])
    gram = tokens.T @ tokens / 400
    spaces = ErrorSpace.of(error.numpy()), ErrorSpace.of(error)
    traces = [float(spaces[0].covariance(gram.numpy()).trace()), float(spaces[1].covariance(gram).trace())]
    assert traces[1] == pytest.approx(traces[0], rel=1e-4)
    norms = [spaces[0].outputs(tokens.numpy()), spaces[1].outputs(tokens).numpy()]
    np.testing.assert_allclose(*(np.square(one).sum(1) for one in norms), rtol=1e-3)
    lifted = spaces[1].lift(top_eigenvectors(spaces[1].covariance(gram), 8))
    torch.testing.assert_close(lifted.T @ lifted, torch.eye(8, dtype=torch.float64), atol=1e-5, rtol=0)


def test_int4_factors_on_a_device_correct_as_much() -> None:
    torch.manual_seed(0)
    error, tokens = torch.randn(80, 128).double(), tokens_of_kinds(600, 128)
    gram = (tokens.T @ tokens / 600).double()
    left = []
    for kind in (lambda each: each.numpy(), lambda each: each):
        space = ErrorSpace.of(kind(error))
        directions = space.lift(top_eigenvectors(space.covariance(kind(gram)), 16))
        packed = pack_correction([directions], kind(error), Hessian(kind(gram)), [None])
        wrong = error - torch.as_tensor(packed.ups[0] @ packed.downs[0])
        left.append(float(((wrong @ gram) * wrong).sum()))
    assert left[1] == pytest.approx(left[0], rel=WITHIN)


def test_statistics_stay_where_they_are_wanted() -> None:
    elsewhere = torch.device("cpu", 0)  # not equal to "cpu"
    weight, tokens = torch.randn(8, 48), tokens_of_kinds(700, 48)
    request = StatisticsRequest(tokens=100, important=4)
    found = []
    for device in (torch.device("cpu"), elsewhere):
        collector = StatisticsCollector("layer", 48, [weight], request, 0, device)
        collector.update(tokens)
        found.append(collector.finish()[0])
    here, there = found
    assert isinstance(there.gram, Tensor)
    assert isinstance(there.tokens, Tensor)
    np.testing.assert_array_equal(here.tokens, there.tokens.numpy())
    np.testing.assert_array_equal(here.importance, there.importance)
    np.testing.assert_allclose(here.gram, there.gram.numpy(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("full"), RuntimeError("CUSOLVER_STATUS_ALLOC_FAILED, when calling ..."),
     RuntimeError("CUDA error: out of memory")],
)  # fmt: skip
def test_a_full_device_ends_in_a_sentence(error: RuntimeError) -> None:
    def fill(device: torch.device) -> None:
        with fitting(device, "one layer", "Choose --device cpu."):
            raise error

    with pytest.raises(ResourceError, match=r"The memory of cuda:1 does not hold one layer\. Choose --device cpu\."):
        fill(torch.device("cuda", 1))
    with pytest.raises(type(error)):
        fill(torch.device("cpu"))


def test_other_errors_of_a_device_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), fitting(torch.device("cuda"), "one layer", ""):
        raise RuntimeError("shapes do not fit")


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{"method": "gptq", "scheme": "w3a16"}, {"method": "qe", "budget": {"bits": 4.5}}], ids=["gptq", "budget"]
)
def test_a_whole_model_is_quantized_the_device_way(keys: dict[str, Any]) -> None:
    made, _ = qe_edge.quantize("demo", qe_edge.make_recipe(**keys), device="cpu:0")
    assert all(tensor.device.type == "cpu" for tensor in made.model.state_dict().values())


@needs_gpu
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_gptq_runs_on_a_gpu(scheme: str) -> None:
    made, _ = qe_edge.quantize("demo", qe_edge.make_recipe(method="gptq", scheme=scheme), device="cuda")
    assert all(tensor.device.type == "cpu" for tensor in made.model.state_dict().values())


@needs_gpu
@pytest.mark.parametrize("name", ["qe w4a8", "gptq w3a16", "qe w4a8, 4.5 bits"])
def test_a_gpu_and_the_cpu_make_the_same_model(name: str) -> None:
    from benchmarks.device_agreement import RECIPES, agree, measure
    from qe_edge.calibration.sources import load_evaluation
    from qe_edge.models.loading import load_model
    from qe_edge.validate.subjects import in_float32

    original, samples = in_float32(load_model("demo")), load_evaluation("demo")
    # twice the 6 % by which the rounding of Gram matrices alone moves the divergence
    assert agree(*(measure(original, samples, RECIPES[name], device) for device in ("cuda", "cpu")), within=0.12)
