"""aespa against float64: what it sees of an attention, how it rounds for it, and what that gains."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qe_edge import make_recipe
from qe_edge.calibration.sources import load_samples
from qe_edge.layers.linear import QELinear, quantized_linears
from qe_edge.methods.aespa import Aespa, round_rows
from qe_edge.models.family import Encoded
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.numerics.grids import PER_CHANNEL, WeightGrid
from qe_edge.quantization.attention import _Layers, _Watched, carried_gram, watch_attention
from qe_edge.quantization.job import encoded_batches
from qe_edge.quantization.quantizer import quantize
from qe_edge.quantization.walk import BlockWalk
from qe_edge.reconstruction.gptq import gptq_round
from qe_edge.reconstruction.problem import HeadGrams, LinearProblem
from qe_edge.system.device import CPU
from qe_edge.system.errors import CommonNotice
from tests.layers import correlated_layer
from tests.models import minicpmv4_6_models
from tests.models.qwen_models import write_qwen
from tests.reference.aespa import attention, met_gram, rotation, round_head
from tests.small_models import write_small_dinov2
from tests.small_vlm import write_small_vlm
from tests.stopping import resumed_after_a_stop

CALIBRATION = {"samples": 3}
LAYER = "model.language_model.layers.1.self_attn"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_vlm(tmp_path_factory.mktemp("model") / "small"))


def watched(loaded: LoadedModel, batches: list[Encoded], name: str, group: str = "language") -> dict[str, HeadGrams]:
    """What is seen of the block that has the layer `name`."""
    walk = BlockWalk(loaded, [group], batches, CPU)
    for chain, position, block in walk:
        with walk.original(block):
            if name.startswith(f"{block.name}."):
                return watch_attention(walk, chain, position, block)
            walk.hand_on(chain, position, walk.run(chain, position, block, {}))
    raise AssertionError(name)


def calls_of(loaded: LoadedModel, batch: Encoded, name: str) -> dict[str, Any]:
    """The arguments of a module, and the outputs of its linear layers, in a plain run of the whole model."""
    module = loaded.model.get_submodule(name)
    seen: dict[str, Any] = {}

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        seen.setdefault("hidden_states", args[0] if args else None)

    def after(leaf: str) -> Any:  # noqa: ANN401 - a hook
        return lambda _module, _inputs, output: seen.__setitem__(leaf, output.double().numpy())

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [getattr(module, leaf).register_forward_hook(after(leaf)) for leaf in ("q_proj", "k_proj", "v_proj")]
    with torch.no_grad():
        loaded.model(**loaded.family.torch_inputs(batch))
    for handle in handles:
        handle.remove()
    return seen


def test_what_is_seen_equals_the_reference(small: str) -> None:
    """Two questions of different lengths, so that there is padding; eight heads share two keys; M-RoPE turns them."""
    loaded = load_model(small)
    samples = sorted(load_samples("demo", 8), key=lambda sample: len(sample.question))
    (batch,) = encoded_batches(loaded, [samples[0], samples[-1]])
    assert not batch.attention_mask.all()
    found = watched(loaded, [batch], LAYER)
    loaded.model.float()
    seen = calls_of(loaded, batch, LAYER)
    cosines, sines = (part.double().numpy() for part in seen["position_embeddings"])
    x = seen["hidden_states"].double().numpy()
    width, heads, keys = 32, 8, 2
    q, k = (seen[leaf].reshape(*x.shape[:2], -1, width) for leaf in ("q_proj", "k_proj"))
    of_query, of_key = np.zeros((heads, width, width)), np.zeros((keys, width, width))
    mixed = np.zeros((keys, x.shape[2], x.shape[2]))
    for sample, mask in enumerate(batch.attention_mask.astype(bool)):
        turns = [rotation(*pair) for pair in zip(cosines[sample], sines[sample], strict=True)]
        turned_q, turned_k = (np.einsum("tij,thj->thi", turns, part[sample]) for part in (q, k))
        counted = [turn for turn, counts in zip(turns, mask, strict=True) if counts]
        for head in range(heads):
            own = head // (heads // keys)
            of_query[head] += met_gram(counted, turned_k[mask, own])
            of_key[own] += met_gram(counted, turned_q[mask, head])
            weights = attention(turned_q[:, head], turned_k[:, own], width**-0.5, mask, causal=True)
            mixed[own] += (weights @ x[sample]).T @ (weights @ x[sample])
    tokens = batch.attention_mask.sum()
    for leaf, expected in (("q_proj", of_query), ("k_proj", of_key)):
        grams = found[f"{LAYER}.{leaf}"].outputs
        assert grams is not None
        assert np.linalg.norm(grams.numpy() - expected / tokens) < 1e-4 * np.linalg.norm(expected / tokens)
    values = found[f"{LAYER}.v_proj"]
    assert (values.count, values.outputs) == (keys, None)
    for gram, wanted in zip(values.inputs, mixed / tokens, strict=True):
        assert np.linalg.norm(gram.numpy() - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_padding_behind_the_tokens_mixes_no_values() -> None:
    """It sees what is before it where there is no mask but the causal one."""
    torch.manual_seed(0)
    names = ("q_proj", "k_proj", "v_proj")
    linears = (nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    x, counted = torch.randn(1, 3, 4), torch.tensor([[True, True, False]])
    one = _Watched(nn.Module(), _Layers(names, linears))
    one.begin(counted)
    query, key, _ = (one.kept(name, x, layer(x)).unsqueeze(1) for name, layer in zip(names, linears, strict=True))
    one.see(query, key, None, 0.5, causal=True)
    read_q, read_k = (part[0, 0].detach().double().numpy() for part in (query, key))
    rows = attention(read_q, read_k, 0.5, counted[0].numpy(), causal=True) @ x[0].double().numpy()
    np.testing.assert_allclose(one.finish()["v_proj"].inputs[0].numpy(), rows.T @ rows / 2, rtol=1e-4, atol=1e-6)


def test_a_norm_between_layer_and_scores_is_differentiated() -> None:
    torch.manual_seed(0)
    source = torch.randn(1, 5, 2 * 4, requires_grad=True)
    gain, keys = torch.rand(4) + 0.5, torch.randn(1, 2, 7, 4).double()

    def normed(part: Tensor) -> Tensor:
        return part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain

    output = normed(source.view(1, 5, 2, 4)).transpose(1, 2)
    valid = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0]])
    grams = keys.transpose(2, 3) @ keys
    found = carried_gram(output, source, grams, valid)
    for head in range(2):
        expected = torch.zeros(4, 4).double()
        for token in (0, 1, 3, 4):
            point = source.detach().view(1, 5, 2, 4)[0, token, head].double()
            slope: Tensor = torch.autograd.functional.jacobian(normed, point)  # type: ignore[no-untyped-call] # torch has no types here
            expected += slope.T @ grams[0, head] @ slope
        torch.testing.assert_close(found[head], expected, rtol=1e-4, atol=1e-4)


def test_rounding_equals_gptq_with_the_hessian_of_the_whole_head() -> None:
    weight, x = correlated_layer(12, 16, 200)
    gram = (x.double().T @ x.double() / len(x)).numpy()
    keys = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(0)).double()
    keys[..., 1] += 0.8 * keys[..., 0]
    outputs = keys.transpose(1, 2) @ keys / 40
    grid = WeightGrid(3, PER_CHANNEL, True)
    found = round_rows(weight, gram, outputs, grid, damping=0.01).decode().double().numpy()
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        expected = round_head(weight[rows].double().numpy(), gram, outputs[head].numpy(), 3, 0.01)
        np.testing.assert_allclose(found[rows], expected, atol=1e-5)
    assert not np.allclose(found, gptq_round(weight, gram, grid, 0.01).decode().numpy())


@pytest.mark.parametrize("scheme", ["w3a8", "w3a16"])
def test_scores_and_outputs_of_the_attention_lose_less_than_with_gptq(small: str, scheme: str) -> None:
    """The cost that is minimized, and the output of the values as the attention mixes them, with all else exact."""
    problems: dict[str, LinearProblem] = {}
    lost: dict[str, dict[str, float]] = {}
    for method in ("aespa", "gptq"):
        with pytest.MonkeyPatch.context() as patch:
            work = Aespa.quantize
            patch.setattr(Aespa, "quantize", lambda self, p, w=work: w(self, problems.setdefault(p.name, p)))
            layers = quantized_linears(
                quantize(small, make_recipe(method=method, scheme=scheme, calibration=CALIBRATION))[0].model
            )
        lost[method] = {name: cost(layers[name], problem) for name, problem in problems.items() if problem.heads}
    assert len(lost["gptq"]) == 6
    for name, before in lost["gptq"].items():
        assert lost["aespa"][name] < before, name
    total = {method: sum(losses[name] / lost["gptq"][name] for name in losses) / 6 for method, losses in lost.items()}
    assert total["aespa"] < 0.9


def cost(layer: QELinear, problem: LinearProblem) -> float:
    """What a layer's error costs the attention."""
    heads = problem.heads
    assert heads is not None
    error = (layer.decoded_weight() - problem.weight).double()
    parts = error.view(heads.count, -1, error.shape[1])
    if heads.outputs is None:
        return float(sum((part @ gram.double() * part).sum() for part, gram in zip(parts, heads.inputs, strict=True)))
    gram = torch.as_tensor(problem.gram()).double()
    return float((heads.outputs @ parts @ gram * parts).sum())


def test_options_that_leave_nothing_are_gptq_and_each_changes_its_layers(small: str) -> None:
    def codes(method: str, **options: bool) -> dict[str, Tensor]:
        recipe = make_recipe(method=method, scheme="w3a16", options=options, calibration=CALIBRATION)
        return {name: layer.qweight for name, layer in quantized_linears(quantize(small, recipe)[0].model).items()}

    plain = codes("gptq")
    for scores, values in ((False, False), (True, False), (False, True)):
        found = codes("aespa", scores=scores, values=values)
        changed = {name.rpartition(".")[2] for name, code in found.items() if not torch.equal(code, plain[name])}
        assert changed == {*(("q_proj", "k_proj") if scores else ()), *(("v_proj",) if values else ())}


def test_a_resumed_run_and_every_part_of_a_model(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(method="aespa", modules=("language", "visual", "merger"), calibration=CALIBRATION)
    with pytest.warns(
        CommonNotice, match=r"blocks of 'visual' show no attention.*as gptq"
    ):  # query, key and value are one layer there
        whole, _ = quantize(small, recipe)
    resumed = resumed_after_a_stop(Aespa, small, recipe, tmp_path / "work", monkeypatch)
    after = resumed.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in whole.model.state_dict().items())


def test_nothing_of_the_watching_stays(small: str) -> None:
    loaded = load_model(small)
    before = loaded.model.get_decoder().config._attn_implementation  # type: ignore[operator, union-attr] # of transformers
    batches = encoded_batches(loaded, load_samples("demo", 2))
    watched(loaded, batches, LAYER)
    attention_layer = loaded.model.get_submodule(LAYER)
    assert attention_layer.config._attn_implementation == before == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.model.modules())
    assert torch.is_grad_enabled()


def test_encoders_see_both_ways(tmp_path: Path) -> None:
    loaded = load_model(str(write_small_dinov2(tmp_path / "dinov2")))
    batches = encoded_batches(loaded, load_samples("demo", 2))
    name = next(name for name, _ in loaded.model.named_modules() if name.endswith("attention.q_proj"))
    found = watched(loaded, batches, name, "visual")
    assert sorted(key.rpartition(".")[2] for key in found) == ["k_proj", "q_proj", "v_proj"]
    module = loaded.model.get_submodule(name.rpartition(".")[0])
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    loaded.model.float()
    with torch.no_grad():
        for batch in batches:
            loaded.model(**loaded.family.torch_inputs(batch))
    handle.remove()
    (x,) = seen
    head, total, keys = 0, 0.0, np.zeros((16, 16))
    for sample in x:
        q, k = (layer(sample)[:, :16].detach().double().numpy() for layer in (module.q_proj, module.k_proj))
        weights = attention(q, k, 16**-0.5, np.ones(len(q), bool), causal=False)
        rows = weights @ sample.double().numpy()
        total = total + rows.T @ rows
        keys += met_gram([np.eye(16)] * len(k), k)
    tokens = x.shape[0] * x.shape[1]
    value, query = (found[f"{name.rpartition('.')[0]}.{leaf}"] for leaf in ("v_proj", "q_proj"))
    assert query.outputs is not None
    np.testing.assert_allclose(value.inputs[head].numpy(), total / tokens, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(query.outputs[head].numpy(), keys / tokens, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("write", "seen"),
    [
        (partial(write_qwen, model_type="qwen3_vl"), True),  # norms of queries and keys
        (partial(write_qwen, model_type="qwen3_5"), False),  # a gate beside the query, and layers that keep states
        (minicpmv4_6_models.write, False),  # pictures of one batch are attended to one by one
    ],
)
def test_families_are_seen_or_named(write: Callable[[Path], Path], seen: bool, tmp_path: Path) -> None:
    recipes = [
        make_recipe(method=method, scheme="w4a16", modules=("language", "visual"), calibration=CALIBRATION)
        for method in ("aespa", "gptq")
    ]
    folder = str(write(tmp_path / "model"))
    with warnings.catch_warnings(record=True) as notices:
        warnings.simplefilter("always")
        found, plain = (quantized_linears(quantize(folder, recipe)[0].model) for recipe in recipes)
    said = {str(notice.message).partition(" show")[0] for notice in notices if "as gptq" in str(notice.message)}
    changed = {name for name, layer in found.items() if not torch.equal(layer.qweight, plain[name].qweight)}
    assert bool(changed) == seen
    assert said == {"Some blocks of 'visual'"} | (set() if seen else {"Some blocks of 'language'"})
