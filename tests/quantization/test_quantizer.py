"""Quantizing a whole model: every scheme and module, resuming, bad weights, determinism, and the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_edge.calibration.sources import load_samples
from qe_edge.layers.linear import QELinear, quantized_linears
from qe_edge.models.family import Sample
from qe_edge.models.groups import linear_groups
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization import job
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.files import load_recipe
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.recipes.stored import load_checkpoint_recipe
from qe_edge.system import parallel
from qe_edge.system.errors import (
    ArtifactError,
    CalibrationError,
    NumericalError,
    QEError,
    RecipeError,
    UnknownNameError,
)
from qe_edge.system.progress import Silent
from tests.sealing import seal
from tests.stopping import KilledError, StopAfter

ALL = ("language", "visual", "merger")
FEW = {"samples": 4}
QUICK = {"tokens": 128, "em_steps": 1}


def quick_recipe(**values: object) -> Recipe:
    defaults: dict[str, object] = {"method": "qe", "options": QUICK, "calibration": FEW}
    return make_recipe(**{**defaults, **values})


def prompt_logits(loaded: LoadedModel, samples: list[Sample]) -> torch.Tensor:
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, samples))
    with torch.no_grad():
        return loaded.model.float()(**inputs).logits


class Units(Silent):
    """What is told of a run, part by part."""

    def __init__(self) -> None:
        self.total = 0.0
        self.parts: dict[str, float] = {}

    def start(self, _title: str, total: float) -> None:
        self.total = total

    def advance(self, amount: float, note: str) -> None:
        part = note.rpartition(": ")[2] if ": " in note else "gradients" if note == "gradients" else "quantizing"
        self.parts[part] = self.parts.get(part, 0.0) + amount


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, ["quantizing"]),
        ({"budget": {"bits": 4.5}}, ["gradients", "measuring", "quantizing"]),
        ({"options": {**QUICK, "token_power": 1.0}}, ["gradients", "quantizing"]),
        ({"method": "mbq", "options": {}}, ["gradients", "quantizing"]),
    ],
)
def test_every_pass_over_the_model_is_told(
    small: str, tmp_path: Path, values: dict[str, Any], parts: list[str]
) -> None:
    """Each is as long as the others, and a resumed run tells those that it has."""
    whole, again = Units(), Units()
    quantize(small, quick_recipe(**values), work=tmp_path / "work", progress=whole)
    quantize(small, quick_recipe(**values), work=tmp_path / "work", resume=True, progress=again)
    for told in (whole, again):
        assert list(told.parts) == parts
        assert list(told.parts.values()) == pytest.approx([told.total / len(parts)] * len(parts))


@pytest.fixture(scope="module")
def original_logits(small: str, samples: list[Sample]) -> torch.Tensor:
    return prompt_logits(load_model(small), samples)


@pytest.fixture(scope="module")
def saved(small: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel]:
    loaded, recipe = quantize(small, quick_recipe(modules=ALL))
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_quantized(loaded, recipe, folder)
    return folder, loaded


@pytest.mark.parametrize("scheme", ["w4a8", "w4a6", "w4a16", "w3a16", "w3a8", "w2a16"])
@pytest.mark.parametrize("method", ["rtn", "qe"])
def test_every_scheme_stays_near_the_original(
    small: str, method: str, scheme: str, samples: list[Sample], original_logits: torch.Tensor
) -> None:
    options = QUICK if method == "qe" else {}
    loaded, _ = quantize(small, quick_recipe(method=method, scheme=scheme, options=options))
    logits = prompt_logits(loaded, samples)
    error = (logits - original_logits).norm() / original_logits.norm()
    assert 0 < error < 0.25


@pytest.mark.parametrize("modules", [("language",), ("visual",), ("merger",), ALL])
def test_modules_are_selected_separately(small: str, modules: tuple[str, ...]) -> None:
    loaded, _ = quantize(small, quick_recipe(method="rtn", options={}, modules=modules))
    group = {block.name: block.group for block in loaded.family.blocks(loaded.model)}
    found = {
        next(group[block] for block in group if name.startswith(block)) for name in quantized_linears(loaded.model)
    }
    assert found == set(modules)
    left = [
        name
        for block in loaded.family.blocks(loaded.model)
        if block.group in modules
        for name, module in block.module.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert left == []


def test_quantizing_improves_on_rounding_at_six_bit_activations(
    small: str, samples: list[Sample], original_logits: torch.Tensor
) -> None:
    errors = {}
    for method in ("rtn", "qe"):
        options = QUICK if method == "qe" else {}
        loaded, _ = quantize(small, quick_recipe(method=method, scheme="w4a6", options=options))
        errors[method] = float((prompt_logits(loaded, samples) - original_logits).norm())
    assert errors["qe"] < errors["rtn"]


def test_sequential_flow_sees_the_quantized_stream(small: str) -> None:
    parallel, _ = quantize(small, quick_recipe(flow="parallel"))
    sequential, _ = quantize(small, quick_recipe(flow="sequential"))
    one, two = quantized_linears(parallel.model), quantized_linears(sequential.model)
    first, last = next(iter(one)), list(one)[-1]
    assert torch.equal(one[first].down, two[first].down)  # the first block has no quantized block before it
    assert not torch.equal(one[last].down, two[last].down)


def test_siblings_share_their_experts(saved: tuple[Path, LoadedModel]) -> None:
    layers = quantized_linears(load_quantized(saved[0]).model)
    query = next(layer for name, layer in layers.items() if name.endswith("layers.0.self_attn.q_proj"))
    key = next(layer for name, layer in layers.items() if name.endswith("layers.0.self_attn.k_proj"))
    assert query.down is not None
    assert query.down is key.down
    assert query.router is key.router
    assert query.out_features != key.out_features


def test_linear_groups_cover_every_linear_once(small: str) -> None:
    loaded = load_model(small)
    for block in loaded.family.blocks(loaded.model):
        groups = linear_groups(block, loaded.family.siblings)
        names = [name for group in groups for name in group.names]
        linears = [
            f"{block.name}.{name}"
            for name, module in block.module.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        assert sorted(names) == sorted(linears)


def test_reloading_is_bit_identical(saved: tuple[Path, LoadedModel], samples: list[Sample]) -> None:
    folder, loaded = saved
    again = load_quantized(folder)
    before, after = loaded.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
        assert tensor.dtype == after[name].dtype, name
    assert torch.equal(prompt_logits(again, samples), prompt_logits(load_quantized(folder), samples))
    assert load_checkpoint_recipe(folder).calibration.samples == 4


def test_weights_are_packed_on_disk(saved: tuple[Path, LoadedModel]) -> None:
    tensors = load_file(saved[0] / "model.safetensors")
    packed = [tensor for name, tensor in tensors.items() if name.endswith(".qweight")]
    assert packed
    layers = quantized_linears(saved[1].model).values()
    assert (
        sum(tensor.numel() for tensor in packed) == sum(layer.in_features * layer.out_features for layer in layers) // 2
    )


@pytest.mark.parametrize("flow", ["parallel", "sequential"])
def test_a_stopped_run_resumes_to_the_identical_checkpoint(small: str, tmp_path: Path, flow: str) -> None:
    recipe = quick_recipe(modules=ALL, flow=flow)
    whole, spec = quantize(small, recipe)
    save_quantized(whole, spec, tmp_path / "whole")
    work = tmp_path / "work"
    for blocks in (2, 3):
        with pytest.raises(KilledError):
            quantize(small, recipe, work=work, resume=work.exists(), progress=StopAfter(blocks))
    resumed, spec = quantize(small, recipe, work=work, resume=True)
    save_quantized(resumed, spec, tmp_path / "resumed")
    for name in ("model.safetensors", "config.json", "recipe.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_threads_change_no_bit_batches_and_order_nothing_but_roundings(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layers(batch: int, threads: int, *, side_by_side: bool = True) -> dict[str, QELinear]:
        monkeypatch.setattr(job, "BATCH", batch)
        monkeypatch.setattr(parallel, "MEDIUM", 1 << 25 if side_by_side else 0)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return quantized_linears(quantize(small, quick_recipe(modules=ALL))[0].model)
        finally:
            torch.set_num_threads(before)

    wanted, other_threads, other_batches = layers(8, 2), layers(8, 1), layers(3, 2)
    in_turn = layers(8, 2, side_by_side=False)
    linears = dict(load_model(small).model.named_modules())
    for name, layer in wanted.items():
        state, same = layer.state_dict(), other_threads[name].state_dict()
        assert all(torch.equal(tensor, same[key]) for key, tensor in state.items()), name
        # a last bit that differs can turn a code, and GPTQ every code after it: as good, but not the same
        tokens = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(0))
        original = linears[name].float()(tokens).detach()
        one, *others = (
            (found(tokens).detach() - original).norm() for found in (layer, other_batches[name], in_turn[name])
        )
        assert all(abs(float(one - other)) < 0.2 * float(one) for other in others), name


def test_resuming_another_recipe_is_refused(small: str, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(KilledError):
        quantize(small, quick_recipe(), work=work, progress=StopAfter(1))
    with pytest.raises(ArtifactError, match="--resume"):
        quantize(small, quick_recipe(), work=work)
    with pytest.raises(ArtifactError, match="another model, recipe"):
        quantize(small, quick_recipe(scheme="w4a6"), work=work, resume=True)


def test_bad_weights_are_named_before_any_work(small: str, samples: list[Sample]) -> None:
    loaded = load_model(small)
    block = loaded.family.blocks(loaded.model)[-1]
    next(iter(block.module.parameters())).data.view(-1)[0] = float("nan")
    with pytest.raises(NumericalError, match=block.name.replace(".", r"\.")):
        quantize(loaded, quick_recipe(), samples)


def test_no_calibration_sample_is_an_error(small: str) -> None:
    with pytest.raises(CalibrationError):
        quantize(small, quick_recipe(), [])
    with pytest.raises(CalibrationError, match="no calibration source"):
        load_samples("/nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Line 1"),
        ('{"image": "x.png"}', "Line 1"),
        ('{"image": "x.png", "question": "what?"}', "missing picture"),
        ('{"image": "../secret.png", "question": "what?"}', "outside its folder"),
    ],
)
def test_a_bad_calibration_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        load_samples(str(path))


def edit_config(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        change(config["quantization_config"])
        path.write_text(json.dumps(config), encoding="utf-8")

    return damage


def edit_weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def first(values: dict, ending: str) -> str:
    return next(name for name in values if name.endswith(ending))


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


HOSTILE = {
    "truncated": cut_off,
    "huge header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64),
    "version": edit_config(lambda section: section.update(version=99)),
    "layers missing": edit_config(lambda section: section.pop("layers")),
    "rank": edit_config(lambda section: section["layers"][first(section["layers"], "o_proj")].update(rank_shared=64)),
    "negative": edit_config(
        lambda section: section["layers"][first(section["layers"], "o_proj")].update(in_features=-4)
    ),
    "group": edit_config(lambda section: section["layers"][first(section["layers"], "o_proj")].update(group_size=24)),
    "unknown layer": edit_config(lambda section: section["layers"].update(evil=next(iter(section["layers"].values())))),
    "alias": edit_config(
        lambda section: section["shared"].update({first(section["shared"], ".down"): "lm_head.weight"})
    ),
    "code width": edit_weights(lambda t: t.update({first(t, ".qweight"): torch.zeros(2, 2, dtype=torch.uint8)})),
    "missing tensor": edit_weights(lambda t: t.pop(first(t, ".scales"))),
    "extra tensor": edit_weights(lambda t: t.update({"surprise": torch.zeros(1)})),
    "embedding shape": edit_weights(lambda t: t.update({first(t, "embed_tokens.weight"): torch.zeros(3, 3)})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_ends_in_an_error(name: str, saved: tuple[Path, LoadedModel], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    load_quantized(folder)
    HOSTILE[name](folder)
    seal(folder)
    with pytest.raises(QEError):
        load_quantized(folder)


def test_quantized_layer_keeps_dtype_and_shape() -> None:
    from qe_edge import quantize_linear

    quantized = quantize_linear(torch.randn(24, 32), torch.randn(100, 32), quick_recipe(), torch.randn(24))
    assert isinstance(quantized, QELinear)
    y = quantized(torch.randn(2, 5, 32, dtype=torch.bfloat16))
    assert y.shape == (2, 5, 24)
    assert y.dtype == torch.bfloat16
    with pytest.raises(RecipeError):
        quantize_linear(torch.randn(24, 32), torch.randn(100, 31), quick_recipe())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metod": "qe"}, "Did you mean 'method'"),
        ({"method": "qee"}, "Did you mean 'qe'"),
        ({"scheme": "w4a9"}, "Did you mean 'w4a"),
        ({"modules": ("langage",)}, "Did you mean 'language'"),
        ({"preset": "papier"}, "Did you mean 'paper'"),
        ({"options": {"shared_rnk": 8}}, "Did you mean 'options.shared_rank'"),
        ({"options": {"shared_rank": "many"}}, "options.shared_rank"),
        ({"calibration": {"sample": 3}}, "Did you mean 'calibration.samples'"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_bad_recipe_names_the_key_and_the_nearest_valid_one(values: dict[str, object], message: str) -> None:
    with pytest.raises((RecipeError, UnknownNameError), match=message.replace("(", r"\(")):
        make_recipe(**values)


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("scheme: w4a6\noptions: {experts: 4}\n", encoding="utf-8")
    assert make_recipe(**load_recipe(path)).scheme == "w4a6"
    for text in ("- a list", "scheme: [", "&a [*a]"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(RecipeError):
            load_recipe(path)
    with pytest.raises(RecipeError):
        load_recipe(tmp_path / "missing.yaml")
