"""What has to hold for every vision-language family: one class of checks, which a test file per family fills in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Block, Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.streaming import Streamer, chains_of, first_tensor, run_block
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.validate import validate
from tests.models.conversations import CASES, greedy, torch_logits

GROUPS = ("visual", "merger", "language")
SAMPLES = [*CASES["batch"], *CASES["several turns"]]
QUICK = {"tokens": 128, "em_steps": 1}
TOKENS = 6


@dataclass(frozen=True)
class Made:
    """A quantized model in float32, its folders, and the engine of its graphs."""

    loaded: LoadedModel
    engine: VisionLanguageEngine
    checkpoint: Path
    onnx: Path


def make(model: Path, out: Path, method: str, scheme: str, modules: tuple[str, ...] = GROUPS) -> Made:
    """Quantize, save, load again, export, open."""
    options = QUICK if method == "qe" else {}
    recipe = make_recipe(
        method=method, scheme=scheme, modules=modules, options=options, calibration={"source": "demo", "samples": 4}
    )
    save_quantized(*quantize(str(model), recipe), out / "checkpoint")
    loaded = load_quantized(out / "checkpoint")
    loaded.model.float()
    export_model(out / "checkpoint", out / "onnx")
    return Made(loaded, VisionLanguageEngine.load(out / "onnx", threads=1), out / "checkpoint", out / "onnx")


@contextmanager
def outputs_of(blocks: list[Block]) -> Iterator[dict[str, Tensor]]:
    """What every block puts out while the context is open."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> object:
        return lambda _module, _inputs, output: outputs.__setitem__(name, first_tensor(output))

    handles = [block.module.register_forward_hook(hook(block.name)) for block in blocks]  # type: ignore[arg-type]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def token_errors(made: Made, samples: list[Sample]) -> np.ndarray:
    """Largest error of every valid token's logits, relative to the largest logit."""
    encoded = made.engine.encode(samples, answers=True)
    valid = encoded.attention_mask.astype(bool)
    expected = torch_logits(made.loaded, samples)[valid]
    errors: np.ndarray = np.abs(made.engine.logits(encoded)[valid] - expected).max(-1) / np.abs(expected).max()
    return errors


class FamilyChecks:
    """The checks; a subclass named `Test...` has a fixture `folder` of class scope and the numbers of linear layers.

    Class attributes:
        linears: Linear layers by group.
        cases: Names of the samples that the family takes.
        samples: A batch to quantize with.
    """

    linears: dict[str, int]
    cases: tuple[str, ...] = tuple(CASES)
    samples: tuple[Sample, ...] = tuple(SAMPLES)

    @pytest.fixture(scope="class")
    @classmethod
    def original(cls, folder: Path) -> LoadedModel:
        return load_model(str(folder), torch.float32)

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
        return make(folder, tmp_path_factory.mktemp("w4a16"), "rtn", "w4a16", tuple(cls.linears))

    @pytest.mark.parametrize("module", GROUPS)
    def test_each_part_alone(self, folder: Path, module: str) -> None:
        if module not in self.linears:
            pytest.skip("nothing to quantize")
        loaded, _ = quantize(str(folder), make_recipe(method="rtn", modules=(module,)), self.samples)
        assert len(quantized_linears(loaded.model)) == self.linears[module]
        groups = {block.name: block.group for block in loaded.family.blocks(loaded.model)}
        for name in quantized_linears(loaded.model):
            assert next(group for block, group in groups.items() if name.startswith(f"{block}.")) == module

    def test_blocks_run_alone_as_they_do_in_the_model(self, original: LoadedModel) -> None:
        batch = original.family.encode(original.processor, self.samples, answers=True)
        inputs = original.family.torch_inputs(batch)
        blocks = original.family.blocks(original.model)
        with outputs_of(blocks) as plain, torch.no_grad():
            original.model(**inputs, use_cache=False)
        chains = chains_of(blocks)
        streamer = Streamer(original.model, chains, 1, lambda _: original.model(**inputs, use_cache=False))
        for index in range(len(chains)):
            chain = streamer.record(index)
            for position, block in enumerate(chain.blocks):
                chain.hidden = [run_block(block.module, chain.hidden[0], chain.calls[position][0])]
                assert torch.equal(chain.hidden[0], plain[block.name]), block.name
            streamer.finish(chain)

    def test_quant_experts_and_its_checkpoint(self, folder: Path, original: LoadedModel, tmp_path: Path) -> None:
        recipe = make_recipe(method="qe", modules=tuple(self.linears), options=QUICK)
        loaded, recipe = quantize(str(folder), recipe, self.samples)
        assert len(quantized_linears(loaded.model)) == sum(self.linears.values())
        inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, self.samples, answers=True))
        with torch.no_grad():
            logits, wanted = (model.model(**inputs).logits.float() for model in (loaded, original))
            save_quantized(loaded, recipe, tmp_path / "checkpoint")
            again = load_quantized(tmp_path / "checkpoint").model(**inputs).logits.float()
        assert torch.equal(again, logits)
        assert 0 < (logits - wanted).square().mean() / wanted.square().mean() < 0.5

    @pytest.mark.parametrize("case", list(CASES))
    def test_graphs_equal_transformers(self, made: Made, case: str) -> None:
        if case not in self.cases:
            pytest.skip("not for this family")
        assert token_errors(made, CASES[case]).max() < 1e-5
        prompt = made.engine.encode(CASES[case])
        assert made.engine.generate_ids(prompt, TOKENS) == greedy(made.loaded, CASES[case], TOKENS)

    @pytest.mark.slow
    def test_graphs_round_activations_alike(self, folder: Path, tmp_path: Path) -> None:
        """Now and then the order of a sum decides between two codes, and later tokens of that row differ a little.

        How many tokens come after such a code is chance: the order depends on the machine and its threads. Those before
        it are exact, whatever the pictures.
        """
        made = make(folder, tmp_path, "qe", "w4a8", tuple(self.linears))
        errors = {case: token_errors(made, CASES[case]) for case in self.cases}
        assert max(error.min() for error in errors.values()) < 1e-6
        assert errors["batch"].max() < 0.1

    @pytest.mark.slow
    def test_validation(self, folder: Path, made: Made, tmp_path: Path) -> None:
        build_engines(made.onnx, tmp_path / "engine", "cpu")
        report = validate(str(folder), made.checkpoint, tmp_path / "engine", "demo", onnx=made.onnx, limit=3)
        assert [row.role for row in report.contenders] == ["original", "quantized", "engine"]
        tokens = report.contenders[2].text_tokens
        assert tokens is not None
        assert {layer.group for layer in report.layers} == set(self.linears)
