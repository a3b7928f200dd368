"""Blocks that run one by one on recorded inputs put out what they do inside the model; the others stay on disk."""

from __future__ import annotations

import importlib
import json
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qe_edge.calibration.sources import load_evaluation, load_samples
from qe_edge.methods import LinearProblem
from qe_edge.models import loading, weight_files
from qe_edge.models.configuration import load_family
from qe_edge.models.family import TEXT, Encoded, ModelFamily, Sample
from qe_edge.models.loading import LoadedModel, load_model, load_outside_blocks, resolve_model
from qe_edge.models.quantized import save_quantized
from qe_edge.models.streaming import Streamer, chains_of, fast_products, run_block
from qe_edge.models.tables import tables_of
from qe_edge.quantization.quantizer import quantize
from qe_edge.quantization.walk import BlockWalk
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.device import CPU
from qe_edge.system.errors import ModelError, QENotice
from tests.models.families import outputs_of
from tests.small_models import write_small_dinov2, write_small_llama
from tests.small_vlm import write_small_vlm


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_large_products_equal_those_of_the_plain_model(
    loaded: LoadedModel, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """From bfloat16 inputs they are as far apart as the model's own bfloat16 makes them."""
    monkeypatch.setattr("qe_edge.models.streaming.LARGE_PRODUCT", 0)
    monkeypatch.setattr("qe_edge.models.streaming.multiplies_bfloat16", lambda: precision == "bfloat16")
    batch = loaded.family.encode(loaded.processor, samples[:2], answers=True)
    block = loaded.family.blocks(loaded.model)[-1]
    chains = chains_of(loaded.family.blocks(loaded.model))

    def forward(_index: int) -> None:
        with torch.no_grad():
            loaded.model(**loaded.family.torch_inputs(batch), use_cache=False)

    streamer = Streamer(loaded.model, chains, 1, forward)
    for index in range(len(chains)):
        chain = streamer.record(index)
        for position, one in enumerate(chain.blocks):
            # a device that is not equal to "cpu": arguments are moved there and results back
            with fast_products(one.module, narrow=set(one.module.modules())):
                device = torch.device("cpu", 0)
                chain.hidden = [run_block(one.module, chain.hidden[0], chain.calls[position][0], device)]
        streamer.finish(chain)
    with outputs_of([block]) as outputs:
        forward(0)
    wanted, found = outputs[block.name], chain.hidden[0]
    apart = float((found - wanted).norm() / wanted.norm())
    assert (apart < 1e-5) if precision == "float32" else (1e-4 < apart < 2e-2)


def test_products_are_in_bfloat16_only_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_llama(tmp_path)
    loaded = load_model(str(tmp_path))
    for name, layer in loaded.model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.to(torch.bfloat16 if name.endswith("gate_proj") else torch.float32)
    seen = []

    def note(block: nn.Module, narrow: set[nn.Module]) -> AbstractContextManager[None]:
        seen.extend(name for name, module in block.named_modules() if module in narrow)
        return fast_products(block, narrow)

    monkeypatch.setattr("qe_edge.quantization.walk.fast_products", note)
    quantize(loaded, make_recipe(method="rtn"), [Sample(None, "one two", kind=TEXT)])
    assert set(seen) == {"mlp.gate_proj"}


def test_streamed_blocks_equal_the_plain_model(loaded: LoadedModel, samples: list[Sample]) -> None:
    # the second batch has no picture and never reaches the vision blocks
    parts = [samples[:2], [samples[2]], samples[3:]]
    batches = [loaded.family.encode(loaded.processor, part, answers=True) for part in parts]
    blocks = loaded.family.blocks(loaded.model)

    completed = 0

    def forward(encoded: Encoded) -> None:
        nonlocal completed
        with torch.no_grad():
            loaded.model(**loaded.family.torch_inputs(encoded), use_cache=False)
        completed += 1

    plain = []
    for encoded in batches:
        with outputs_of(blocks) as outputs:
            forward(encoded)
        plain.append(outputs)

    chains = chains_of(blocks)
    assert [chain[0].group for chain in chains] == ["visual", "merger", "language"]
    streamer = Streamer(loaded.model, chains, len(batches), lambda index: forward(batches[index]))
    for index in range(len(chains)):
        chain = streamer.record(index)
        assert chain.batches == ([0, 1, 2] if chain.blocks[0].group == "language" else [0, 2])
        for position, block in enumerate(chain.blocks):
            assert len(chain.calls[position]) == len(chain.batches)
            chain.hidden = [
                run_block(block.module, hidden, call)
                for hidden, call in zip(chain.hidden, chain.calls[position], strict=True)
            ]
            for batch, hidden in zip(chain.batches, chain.hidden, strict=True):
                assert torch.equal(hidden, plain[batch][block.name]), block.name
        streamer.finish(chain)
    # no block runs before its turn: until then it may be in another precision
    assert completed == len(batches)
    assert not any("forward" in block.module.__dict__ for block in blocks)


def test_finished_chains_replay_their_outputs(loaded: LoadedModel, samples: list[Sample]) -> None:
    """A chain sees what the chain before it was given as output, not what its blocks would compute."""
    encoded = loaded.family.encode(loaded.processor, samples[:1])
    inputs = loaded.family.torch_inputs(encoded)
    chains = chains_of(loaded.family.blocks(loaded.model))
    streamer = Streamer(loaded.model, chains, 1, lambda _: loaded.model(**inputs, use_cache=False))
    visual = streamer.record(0)
    assert visual.hidden[0].abs().max() > 0
    visual.hidden = [torch.zeros_like(visual.hidden[0])]
    streamer.finish(visual)
    merger = streamer.record(1)
    # zeros pass the last norm as its bias: all patches alike
    patches = merger.hidden[0].reshape(-1, visual.hidden[0].shape[-1])
    assert torch.equal(patches, patches[:1].expand_as(patches))


def test_a_block_that_returns_a_tuple_is_refused() -> None:
    class Old(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
            return (hidden_states,)

    from qe_edge.models.streaming import BlockCall

    with pytest.raises(ModelError, match="tuple"):
        run_block(Old(), torch.zeros(1, 2, 3), BlockCall((), {}))


def absent_blocks(loaded: LoadedModel) -> list[str]:
    """Names of the blocks of which nothing is in memory."""
    return [
        block.name
        for block in loaded.family.blocks(loaded.model)
        if all(loaded.stored.is_absent(tensor) for tensor in block.module.state_dict().values())
    ]


@pytest.fixture(params=["demo", "internvl", "llama", "dinov2", "sharded llama"])
def folder(request: pytest.FixtureRequest, tiny_internvl: Path, tmp_path: Path) -> str:
    """A model of every family, and one in several files."""
    if request.param in ("demo", "internvl"):
        return "demo" if request.param == "demo" else str(tiny_internvl)
    if request.param == "dinov2":
        return str(write_small_dinov2(tmp_path / "model"))
    whole = str(write_small_llama(tmp_path / "model"))
    if request.param == "llama":
        return whole
    loaded = load_model(whole)
    loaded.model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    loaded.family.save_processor(loaded.processor, tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    return str(tmp_path / "sharded")


def test_blocks_stay_on_disk_and_are_the_same_when_they_are_read(folder: str) -> None:
    plain, streamed = load_model(folder), load_outside_blocks(folder)
    blocks = streamed.family.blocks(streamed.model)
    assert absent_blocks(streamed) == [block.name for block in blocks]
    assert str(streamed.model.config) == str(plain.model.config)
    assert str(streamed.family.config) == str(plain.family.config)
    with streamed.stored.held(blocks[0].name, blocks[0].module):
        assert absent_blocks(streamed) == [block.name for block in blocks[1:]]
    assert absent_blocks(streamed) == [block.name for block in blocks]
    values = plain.model.state_dict()
    assert list(streamed.model.state_dict()) == list(values)
    for name, tensor in streamed.model.state_dict().items():
        assert torch.equal(streamed.stored.value(name, tensor), values[name]), name
        assert tensor.dtype == values[name].dtype, name
    streamed.stored.read("", streamed.model)
    assert absent_blocks(streamed) == []
    parts = zip(streamed.model.named_parameters(), plain.model.named_parameters(), strict=True)
    buffers = zip(streamed.model.named_buffers(), plain.model.named_buffers(), strict=True)
    for (name, tensor), (other, expected) in [*parts, *buffers]:
        assert name == other
        assert torch.equal(tensor, expected), name


def test_a_model_whose_tensors_are_converted_is_loaded_whole_and_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = loading._from_pretrained

    def converting(
        source: str, family: ModelFamily, dtype: torch.dtype | str, tensors: dict[str, Tensor] | None = None
    ) -> PreTrainedModel:
        model = load(source, family, dtype, tensors)
        if tensors is not None:
            parameter = next(family.blocks(model)[-1].module.parameters())
            parameter.data = parameter.data + 0
        return model

    monkeypatch.setattr(loading, "_from_pretrained", converting)
    with pytest.warns(
        QENotice, match=r"All of 'demo' is in memory at once, since its files do not hold 'model\."
    ) as told:
        loaded = load_outside_blocks("demo")
    assert len(told) == 1
    assert absent_blocks(loaded) == []


def test_a_download_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda _source, name: str(tmp_path / name))
    here = {"here": str(tmp_path)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda source, _name: here.get(source))
    with pytest.warns(QENotice, match="Looking for a.safetensors of 'owner/name' on the hub"):
        assert weight_files._hub_file("owner/name", "a.safetensors") == tmp_path / "a.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert weight_files._hub_file("here", "a.safetensors") == tmp_path / "a.safetensors"


def test_what_is_computed_with_a_block_that_is_on_disk_is_nan(samples: list[Sample]) -> None:
    streamed = load_outside_blocks("demo")
    inputs = streamed.family.torch_inputs(streamed.family.encode(streamed.processor, samples[:1]))
    with torch.no_grad():
        assert streamed.model(**inputs).logits.isnan().all()


def test_weights_that_are_read_in_another_precision(tmp_path: Path) -> None:
    """config.json says float32, the file holds bfloat16: blocks that are read later are converted too."""
    folder = write_small_llama(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    plain, streamed = load_model(str(folder)), load_outside_blocks(str(folder))
    assert absent_blocks(streamed) != []
    streamed.stored.read("", streamed.model)
    for name, tensor in streamed.model.state_dict().items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, plain.model.state_dict()[name]), name


def test_no_more_than_one_block_is_in_memory(tmp_path: Path) -> None:
    """Through all that a budget does: weights, gradients, offers, choices; and until the checkpoint is written."""
    opened = load_outside_blocks("demo")
    blocks = opened.family.blocks(opened.model)
    most = 0

    def count(_module: nn.Module, _inputs: object) -> None:
        nonlocal most
        most = max(most, len(blocks) - len(absent_blocks(opened)))

    for block in blocks:
        for linear in (module for module in block.module.modules() if isinstance(module, nn.Linear)):
            linear.register_forward_pre_hook(count)
    recipe = make_recipe(
        method="qe",
        modules=("language", "merger"),
        budget={"bits": 4.6},
        options={"tokens": 64, "em_steps": 0},
        calibration={"samples": 2},
    )
    quantized, spec = quantize(opened, recipe, work=tmp_path / "work", on_disk=True)
    assert most == 1
    assert absent_blocks(quantized) == [block.name for block in blocks]
    save_quantized(quantized, spec, tmp_path / "streamed")
    assert absent_blocks(quantized) == [block.name for block in blocks]
    save_quantized(*quantize(load_model("demo"), recipe), tmp_path / "whole")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_only_a_problems_own_weight_is_in_memory_when_it_is_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the block's other layers nor embedding and head, whatever a budget does with the block."""
    opened, looks = load_outside_blocks("demo"), Counter[str]()
    names = [*(block.name for block in opened.family.blocks(opened.model)), *tables_of(opened.model)]
    linears = {
        name: part
        for name, part in opened.model.named_modules()
        if isinstance(part, (nn.Linear, nn.Embedding)) and any(f"{name}.".startswith(f"{one}.") for one in names)
    }
    for module, function in (("quantizer", "quantize_problem"), ("measure", "candidates_of")):
        work = getattr(importlib.import_module(f"qe_edge.quantization.{module}"), function)

        def look(
            method: object, problem: LinearProblem, function: str = function, work: Callable[..., object] = work
        ) -> object:
            looks[function] += 1
            assert [name for name, part in linears.items() if not opened.stored.is_absent(part.weight)] == []
            return work(method, problem)

        monkeypatch.setattr(f"qe_edge.quantization.{module}.{function}", look)
    recipe = make_recipe(
        method="qe", budget={"bits": 4.6}, options={"tokens": 64, "em_steps": 0}, calibration={"samples": 2}
    )
    quantize(opened, recipe, work=tmp_path / "work", on_disk=True)
    assert looks == {"quantize_problem": 16, "candidates_of": 16}


@pytest.mark.parametrize("method", ["quarot", "mbq", "rtn"])
def test_a_model_on_disk_becomes_the_checkpoint_of_one_in_memory(method: str, folder: str, tmp_path: Path) -> None:
    family = load_family(resolve_model(folder))
    if method != "rtn" and family.model_type in ("dinov2", "internvl"):
        pytest.skip("no loss, or nothing that the other families do not show")
    pictures = family.model_type != "llama"
    given = load_evaluation("demo")[:4] if pictures else [Sample(None, "A text.", kind=TEXT), Sample(None, "?", "No.")]
    modules = ("visual",) if family.model_type == "dinov2" else ("language",)
    recipe = make_recipe(method=method, modules=modules)
    save_quantized(*quantize(load_model(folder), recipe, given), tmp_path / "whole")
    save_quantized(*quantize(folder, recipe, given, work=tmp_path / "work", on_disk=True), tmp_path / "streamed")
    assert {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "streamed").iterdir()
    }
    returned, _ = quantize(folder, recipe, given)
    assert not any(returned.stored.is_absent(tensor) for tensor in returned.model.state_dict().values())


def test_batches_without_pictures_stop_before_what_is_not_walked(tmp_path: Path) -> None:
    """Language blocks that are not walked stay in bfloat16, and states of float32 must not meet them."""
    loaded = load_model(str(write_small_vlm(tmp_path / "model")), torch.bfloat16)
    pictures = load_samples("demo", 2)
    batches = [loaded.family.encode(loaded.processor, part) for part in ([Sample(None, "why?")], pictures)]
    walk = BlockWalk(loaded, ["visual"], batches, CPU)
    reached = []
    for chain, position, block in walk:
        reached.append(chain.batches)
        with walk.original(block):
            walk.hand_on(chain, position, walk.run(chain, position, block, {}))
    assert reached
    assert all(numbers == [1] for numbers in reached)


def test_an_adapter_beside_a_model_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("transformers.utils.hub.cached_file", lambda _source, name: str(tmp_path / name))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is downloaded where there is no adapter, so nothing is said
        with pytest.raises(ModelError, match=r"'owner/name' holds an adapter \('adapter_config.json'\)") as error:
            weight_files.weight_headers("owner/name")
    assert "Merge the adapter into its base model" in error.value.remedy


@pytest.mark.parametrize(
    ("stored", "said", "notices"),
    [
        (torch.float32, "bfloat16", ["hold float32 weights, which are read as bfloat16"]),
        (torch.float32, "float16", ["hold float32 weights, which are read as float16"]),
        (torch.bfloat16, "float32", []),
        (torch.float16, "float16", []),
    ],
)
def test_weights_that_lose_digits_are_told_once(
    stored: torch.dtype, said: str, notices: list[str], tmp_path: Path
) -> None:
    folder = write_small_llama(tmp_path / "model")
    weights = {name: tensor.to(stored) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": said}), encoding="utf-8")
    for load in (load_model, load_outside_blocks):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loaded = load(str(folder))
        assert loaded.model.dtype == getattr(torch, said)
        found = [str(notice.message) for notice in told if isinstance(notice.message, QENotice)]
        assert len(found) == len(notices)
        assert all(notice in text for notice, text in zip(notices, found, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", QENotice)
        load_model(str(folder), dtype=torch.float32)
