"""What has to hold for every vision-language family: one class of checks, which a test file per family fills in."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import IR_VERSION, export_model
from qe_edge.export.preprocessing import first_difference, joined_runs, own_runs, run_picture_graph, write_picture_graph
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Block, ModelFamily, Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.streaming import Streamer, chains_of, first_tensor, run_block
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.chat_segments import read_chat
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.folder_model import FolderModel
from qe_edge.runtime.folder_prompts import FolderPrompts
from qe_edge.runtime.graph_specs import PictureEntry
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.runtime.sessions import OrtSession
from qe_edge.system.errors import InputError
from qe_edge.validate import validate
from tests.models.conversations import CASES, ODD, SQUARE, greedy, noise, torch_logits
from tests.runtime.host_tensorrt import install, lowered_engines

GROUPS = ("visual", "merger", "language")
SAMPLES = [*CASES["batch"], *CASES["several turns"]]
QUICK = {"tokens": 128, "em_steps": 1}
TOKENS = 6
SPELLED = Sample(SQUARE, "is <|im_end|> or <|image_pad|> in this text?", marks=(3,))  # special tokens that are text
PICTURE_SIZES = (
    *((1, 1), (1, 2), (2, 1), (3, 5), (1, 200), (200, 1), (1, 201), (201, 1), (7, 1400), (4, 900)),
    *((28, 28), (27, 29), (29, 27), (14, 42), (64, 64), (63, 65), (56, 168), (60, 300), (300, 60), (203, 117)),
    *((100, 101), (101, 100), (97, 57), (57, 97), (111, 37), (37, 111), (129, 255), (256, 256), (224, 224), (336, 112)),
    *((448, 448), (480, 640), (640, 480), (333, 500), (41, 27), (900, 30), (30, 900), (512, 31), (720, 1280), (5, 5)),
    *((1080, 1920), (1200, 16)),
)
SOME_SIZES = ((1, 1), (5, 9), (200, 1), (60, 300), (168, 56), (203, 117), (333, 500), (97, 1000), (5, 1000))
LARGE_SIZES = ((1, 2), (97, 57), (448, 448), (480, 640), (1080, 1920), (1500, 100), (1000, 1000))  # for real settings


@dataclass(frozen=True)
class Made:
    """A quantized model in float32, its folders, and the engines of its graphs, as exported and as built for a CPU."""

    loaded: LoadedModel
    engine: VisionLanguageEngine
    built: VisionLanguageEngine
    checkpoint: Path
    onnx: Path


def make(model: Path, out: Path, modules: tuple[str, ...] = GROUPS) -> Made:
    """Quantize in W4A16, save, load again, export, build, open."""
    calibration = {"source": "demo", "samples": 4}
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=modules, calibration=calibration)
    save_quantized(*quantize(str(model), recipe), out / "checkpoint")
    return opened(out)


def opened(out: Path) -> Made:
    """Load `out/checkpoint`, export it, build and open its engines."""
    loaded = load_quantized(out / "checkpoint")
    loaded.model.float()
    export_model(out / "checkpoint", out / "onnx")
    build_engines(out / "onnx", out / "cpu", "cpu")
    engine, built = (VisionLanguageEngine.load(out / name, threads=1) for name in ("onnx", "cpu"))
    return Made(loaded, engine, built, out / "checkpoint", out / "onnx")


def export_of(write: Callable[[Path], Path], folder: Path) -> None:
    """A folder with a model, its checkpoint in W4A16 and its graphs."""
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=("language",))
    save_quantized(*quantize(str(write(folder / "model")), recipe), folder / "checkpoint")
    export_model(folder / "checkpoint", folder / "onnx")


def check_picture_graph(
    folder: Path,
    entry: PictureEntry,
    family: ModelFamily,
    processor: Any,  # noqa: ANN401 - each family has its own
    sizes: Sequence[tuple[int, int]],
) -> int:
    """Compare a folder's graph with the family for pictures of noise, to the last bit; count those that both refuse."""
    session = OrtSession(folder, entry, accuracy_level=0, threads=1)
    refused = 0
    for height, width in sizes:
        image = np.asarray(noise(width, height))
        sample = Sample(image, "what?")
        if entry.max_aspect and max(height, width) > entry.max_aspect * min(height, width):
            with pytest.raises(InputError, match="aspect ratio"):
                family.encode(processor, [sample])
            refused += 1
            continue
        computed = run_picture_graph(session, entry, image)
        if not len(computed["placeholder_ids"]):
            with pytest.raises(InputError, match="cannot be prepared"):
                family.encode(processor, [sample])
            refused += 1
            continue
        for count in (1, 2) if entry.counts_pictures else (1,):
            computed = run_picture_graph(session, entry, image, count)
            encoded = family.encode(processor, [Sample([image] * count, "what?")])
            differing = first_difference(computed, family, encoded, count)
            assert differing is None, (height, width, count, differing)
    return refused


def check_settings(
    family: ModelFamily,
    processor: Any,  # noqa: ANN401 - as above
    folder: Path,
    sizes: Sequence[tuple[int, int]] = SOME_SIZES,
) -> int:
    """As `check_picture_graph`, of a family without a model."""
    graph = family.picture_graph(processor)
    assert graph is not None
    return check_picture_graph(folder, write_picture_graph(graph, folder, IR_VERSION), family, processor, sizes)


def check_device_engines(
    made: Made, folder: Path, patch: pytest.MonkeyPatch, cases: tuple[str, ...] = ("square", "batch", "text only")
) -> None:
    """Engines for GPUs, in float16 and with states in float32, answer as the graphs do; ONNX Runtime computes them."""
    install(patch)
    engine = VisionLanguageEngine.load(lowered_engines(made.onnx, folder / "engines", in_place=False))
    for case in cases:
        encoded = made.engine.encode(CASES[case], answers=True)
        valid = encoded.attention_mask == 1
        found, wanted = engine.logits(encoded)[valid], made.engine.logits(encoded)[valid]
        assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max(), case
        asked = made.engine.encode(CASES[case])
        assert engine.generate_ids(asked, TOKENS) == made.engine.generate_ids(asked, TOKENS), case


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
    """Largest error of every valid token's logits, relative to the largest logit, `[engines, tokens]`."""
    encoded = made.engine.encode(samples, answers=True)
    valid = encoded.attention_mask.astype(bool)
    expected = torch_logits(made.loaded, samples)[valid]
    found = np.stack([engine.logits(encoded)[valid] for engine in (made.engine, made.built)])
    errors: np.ndarray = np.abs(found - expected).max(-1) / np.abs(expected).max()
    return errors


def unrotated(folder: Path) -> list[str]:
    """Attention nodes of a built language graph whose queries and keys no single node rotates."""
    graph = onnx.load(folder / "language.onnx", load_external_data=False).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    return [node.name for node in nodes if {makers[name] for name in node.input[:2]} != {"RotaryEmbedding"}]


class FamilyChecks:
    """The checks; a subclass named `Test...` has a fixture `folder` of class scope and the numbers of linear layers.

    Class attributes:
        linears: Linear layers by group.
        cases: Names of the samples that the family takes.
        prepares: Whether a graph prepares its pictures.
        chats: Whether its chat template comes apart.
        samples: A batch to quantize with.
        unrotated: Attention nodes whose queries and keys no single node rotates.
    """

    linears: dict[str, int]
    cases: tuple[str, ...] = tuple(CASES)
    prepares: bool = True
    chats: bool = True
    samples: tuple[Sample, ...] = tuple(SAMPLES)
    unrotated: int = 0

    @pytest.fixture(scope="class")
    @classmethod
    def original(cls, folder: Path) -> LoadedModel:
        return load_model(str(folder), torch.float32)

    @pytest.fixture(scope="class")
    @classmethod
    def made(cls, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
        return make(folder, tmp_path_factory.mktemp("w4a16"), tuple(cls.linears))

    @pytest.fixture(scope="class")
    @classmethod
    def experts(cls, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
        """The model with Quant Experts in W4A8, and a folder with its `checkpoint`."""
        out = tmp_path_factory.mktemp("w4a8")
        recipe = make_recipe(method="qe", modules=tuple(cls.linears), options=QUICK)
        loaded, recipe = quantize(str(folder), recipe, cls.samples)
        save_quantized(loaded, recipe, out / "checkpoint")
        return loaded, out

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

    def test_quant_experts_and_its_checkpoint(self, experts: tuple[LoadedModel, Path], original: LoadedModel) -> None:
        loaded, out = experts
        assert len(quantized_linears(loaded.model)) == sum(self.linears.values())
        inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, self.samples, answers=True))
        with torch.no_grad():
            logits, wanted = (model.model(**inputs).logits.float() for model in (loaded, original))
            again = load_quantized(out / "checkpoint").model(**inputs).logits.float()
        assert torch.equal(again, logits)
        assert 0 < (logits - wanted).square().mean() / wanted.square().mean() < 0.5

    @pytest.mark.parametrize("case", list(CASES))
    def test_graphs_equal_transformers(self, made: Made, case: str) -> None:
        if case not in self.cases:
            pytest.skip("not for this family")
        assert token_errors(made, CASES[case]).max() < 1e-5
        prompt = made.engine.encode(CASES[case])
        wanted = greedy(made.loaded, CASES[case], TOKENS)
        assert made.engine.generate_ids(prompt, TOKENS) == wanted
        assert made.built.generate_ids(prompt, TOKENS) == wanted

    def test_every_rotary_embedding_is_one_node_of_the_built_graph(self, made: Made) -> None:
        assert len(unrotated(made.onnx.parent / "cpu")) == self.unrotated

    def test_a_pipeline_answers_as_the_engine(self, made: Made) -> None:
        """Whatever its cache holds of earlier prompts, and several prompts at once."""
        asked = [sample for case in self.cases for sample in CASES[case]]
        if "several turns" in self.cases:  # whose first turn comes before it
            asked.insert(len(asked) // 2, Sample((SQUARE, ODD), "is there a red shape?", marks=(0, 10)))
            asked.insert(len(asked) // 2 + 1, CASES["several turns"][0])
        expected = [made.engine.generate_ids(made.engine.encode([sample]), TOKENS)[0] for sample in asked]
        pipeline = Pipeline(made.built)
        found = [pipeline(sample, max_new_tokens=TOKENS) for sample in asked]
        assert [list(answer.token_ids) for answer in found] == expected
        together = pipeline(asked, max_new_tokens=TOKENS)
        assert [list(answer.token_ids) for answer in together] == expected

    def test_the_picture_graph_equals_the_image_processor(self, made: Made) -> None:
        """Every output to the last bit, and a picture is refused by both or by none."""
        entry = made.engine.manifest.picture
        assert (entry is not None) == self.prepares
        if entry is None:
            return
        check_picture_graph(made.onnx, entry, made.engine.family, made.engine.processor, PICTURE_SIZES)

    def test_the_chat_template_in_parts_writes_the_same_prompts(self, made: Made) -> None:
        chat = read_chat(made.onnx)
        assert (chat.problem is None) == self.chats
        for sample in [sample for case in self.cases for sample in CASES[case] if self.chats]:
            turns = sample.conversation
            assert chat.text(turns) == made.engine.family.chat_text(made.engine.processor, turns)

    def test_the_folders_own_files_prepare_the_same_prompts(self, made: Made) -> None:
        engine = made.engine
        if engine.manifest.picture is None or not self.chats:
            pytest.skip("no such files")
        prompts = FolderPrompts(made.onnx, engine.manifest)
        for sample in [SPELLED, *(sample for case in self.cases for sample in CASES[case])]:
            pictures = [np.asarray(open_image(picture)) for picture in sample.pictures]
            found, encoded = prompts.read(sample.conversation, pictures), engine.encode([sample])
            assert np.array_equal(found.ids, encoded.input_ids)
            assert np.array_equal(found.image_mask, encoded.image_mask)
            assert np.array_equal(found.positions, engine.family.position_ids(encoded))
            assert np.array_equal(found.numbers, engine.family.graph_mask(encoded))
            count = 1 if engine.family.pictures_stand_alone else len(pictures)
            alone = [engine.encode([Sample([picture] * count, "?")]) for picture in sample.pictures]
            wanted = joined_runs([run for one in alone for run in own_runs(engine.family, one, count)])
            # families run the images of one size together
            for one, other in zip(joined_runs(found.feeds), wanted, strict=True):
                assert set(one) == set(other)
                assert all(np.array_equal(one[name], other[name]) for name in one)

    def test_answers_without_transformers(self, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
        """From the files of a built folder, with pictures prepared by their graph."""
        if made.engine.manifest.picture is None or not self.chats:
            pytest.skip("no such files")

        def find(name: str) -> ModuleSpec | None:
            return None if name == "transformers" else importlib.util.find_spec(name)

        monkeypatch.setattr("qe_edge.runtime.engine.find_spec", find)
        bare = VisionLanguageEngine.load(made.onnx.parent / "cpu", threads=1)
        assert isinstance(bare.family, FolderModel)
        for case in ("odd sizes", "batch"):
            if case in self.cases:
                wanted = made.built.generate_ids(made.built.encode(CASES[case]), TOKENS)
                assert bare.generate_ids(bare.encode(CASES[case]), TOKENS) == wanted, case
        pipelines, asked = (Pipeline(bare), Pipeline(made.built)), CASES["two pictures"][0]
        for _ in range(2):  # at last its pictures are remembered
            found, expected = (pipeline(asked, max_new_tokens=TOKENS) for pipeline in pipelines)
            assert found.token_ids == expected.token_ids

    @pytest.mark.slow
    def test_graphs_round_activations_alike(self, experts: tuple[LoadedModel, Path]) -> None:
        """Now and then the order of a sum decides between two codes, and later tokens of that row differ a little.

        How many tokens come after such a code is chance: the order depends on the machine and its threads. Those before
        it are exact, whatever the pictures.
        """
        made = opened(experts[1])
        errors = {case: token_errors(made, CASES[case]) for case in self.cases}
        assert max(error.min() for error in errors.values()) < 1e-6
        assert errors["batch"].max() < 0.1

    @pytest.mark.slow
    @pytest.mark.usefixtures("measured_here")
    def test_validation(self, folder: Path, made: Made) -> None:
        engines = made.onnx.parent / "cpu"
        report = validate(str(folder), made.checkpoint, engines, "demo", onnx=made.onnx, limit=3)
        assert [row.role for row in report.contenders] == ["original", "quantized", "engine"]
        tokens = report.contenders[2].text_tokens
        assert tokens is not None
        assert {layer.group for layer in report.layers} == set(self.linears)
        assert [row.runtime for row in report.latency] == ["onnxruntime", "onnxruntime", "pytorch"]
