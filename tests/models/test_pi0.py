"""pi0: inputs and actions as transformers', calibration at every step of denoising, engines, and its refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.image_utils import get_image_size_for_max_height_width
from transformers.models.pi0.processing_pi0 import PI0Processor

import qe_edge
from qe_edge.calibration.lines import read_line
from qe_edge.cli import main
from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.opening import open_graph
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.export_limits import check_deployable
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.pi0_processor import PI0ImageProcessorPil
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.models.streaming import Streamer, chains_of, run_block
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import MODULES, make_recipe
from qe_edge.runtime.actions import ActionEngine, noise_of
from qe_edge.runtime.encoder import EncoderEngine
from qe_edge.runtime.limits import EngineLimits
from qe_edge.system.errors import ArtifactError, CommonNotice, InputError, ModelError
from qe_edge.validate import validate_actions
from qe_edge.validate.actions import TorchActor, action_errors
from tests.cli.running import Outcome, Run
from tests.models.conversations import ODD, SQUARE, TALL, WIDE, noise
from tests.models.families import QUICK, outputs_of
from tests.models.pi0_models import (
    ACTION,
    CALIBRATION,
    CASES,
    CHUNK,
    LINEARS,
    SIDE,
    STATISTICS,
    STEPS,
    TASK,
    TOKENS,
    WIDTH,
    recorded,
    state,
    write,
)


@dataclass(frozen=True)
class Made:
    """A model in W4A16, and its engines."""

    loaded: LoadedModel
    engine: ActionEngine
    built: ActionEngine
    folder: Path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line inside this process."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pi0") / "model")


@pytest.fixture(scope="module")
def original(folder: Path) -> LoadedModel:
    return load_model(str(folder), torch.float32)


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    out = tmp_path_factory.mktemp("w4a16")
    recipe = make_recipe(method="rtn", scheme="w4a16", modules=MODULES)
    save_quantized(*quantize(str(folder), recipe, CALIBRATION), out / "checkpoint")
    export_model(out / "checkpoint", out / "onnx")
    build_engines(out / "onnx", out / "cpu", "cpu")
    loaded = load_quantized(out / "checkpoint")
    loaded.model.float()
    return Made(loaded, *(ActionEngine.load(out / name, threads=1) for name in ("onnx", "cpu")), out)


def actions_of(loaded: LoadedModel, samples: list[Sample], steps: int | None = None) -> np.ndarray:
    """What transformers' own method makes of the seeds 0, 1, ..."""
    encoded = loaded.family.encode(loaded.processor, samples)
    return TorchActor(loaded).actions(encoded, noise_of((CHUNK, WIDTH), range(len(samples))), steps)


class TorchPictures(PI0ImageProcessorPil):
    """Pictures as transformers' own class prepares them, which needs torchvision; by torch alone."""

    def __call__(self, images: list[Image.Image], **_options: object) -> Any:  # noqa: ANN401 - transformers' interface
        found = []
        for image in images:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
            size = get_image_size_for_max_height_width(pixels.shape[-2:], SIDE, SIDE)
            scaled = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True).float()
            mean = torch.full((1, 3, 1, 1), 0.5) * (1.0 / (1 / 255))
            room = (0, SIDE - size[1], 0, SIDE - size[0])
            found.append(torch.nn.functional.pad((scaled - mean) / mean, room))
        return {"pixel_values": torch.cat(found)}


def as_transformers(folder: Path, samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Inputs as transformers' processor makes them; it pads on the right."""
    pictures = TorchPictures()
    pictures.image_seq_length = TOKENS
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = PI0Processor(pictures, tokenizer, **STATISTICS, max_state_dim=WIDTH, chunk_size=CHUNK)
    texts, states = [sample.question for sample in samples], [list(sample.state or ()) for sample in samples]
    images = [[open_image(picture) for picture in sample.pictures] for sample in samples]
    return dict(processor(images=images, text=texts, state=states, padding=True))


def test_inputs_are_those_of_transformers(original: LoadedModel, folder: Path) -> None:
    for name, samples in CASES.items():
        encoded = original.family.encode(original.processor, samples)
        found, wanted = original.family.torch_inputs(encoded), as_transformers(folder, samples)
        for key in ("pixel_values", "pixel_attention_mask", "state"):
            assert torch.equal(found[key], wanted[key]), (name, key)
        for row, other in zip(range(len(samples)), wanted["input_ids"], strict=True):
            ids = encoded.input_ids[row][encoded.attention_mask[row] == 1]
            assert ids.tolist() == other[wanted["attention_mask"][row] == 1].tolist(), name


def test_pictures_of_all_shapes_to_the_last_bit() -> None:
    size = {"height": SIDE, "width": SIDE}
    ours = PI0ImageProcessorPil(pad_size=size, size={"max_height": SIDE, "max_width": SIDE})
    for width, height in ((16, 16), (7, 5), (33, 100), (199, 40), (17, 16), (250, 16), (100, 37), (37, 100)):
        picture = noise(width, height)
        wanted = TorchPictures()([picture])["pixel_values"].numpy()
        assert np.array_equal(ours(images=[picture])["pixel_values"], wanted), (width, height)


def test_actions_of_transformers_own_inputs(original: LoadedModel, folder: Path) -> None:
    """Padding on the right, and a camera that is masked between two others."""
    noises = torch.from_numpy(noise_of((CHUNK, WIDTH), range(3)))
    inputs = as_transformers(folder, CASES["batch"])
    model: Any = original.model
    found = model.sample_actions(**inputs, noise=noises).numpy()
    assert np.abs(found - actions_of(original, CASES["batch"])).max() < 1e-5
    two = original.family.torch_inputs(original.family.encode(original.processor, CASES["two cameras"]))
    pixels = two["pixel_values"]
    hole = {
        "pixel_values": torch.stack([pixels[:, 0], torch.ones_like(pixels[:, 0]), pixels[:, 1]], 1),
        "pixel_attention_mask": torch.tensor([[True, False, True]]),
    }
    found = model.sample_actions(**{**two, **hole}, noise=noises[:1]).numpy()
    assert np.abs(found - actions_of(original, CASES["two cameras"])).max() < 1e-5


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize("module", MODULES)
def test_each_part_alone(folder: Path, original: LoadedModel, module: str, scheme: str) -> None:
    loaded, _ = quantize(str(folder), make_recipe(method="rtn", scheme=scheme, modules=(module,)), CALIBRATION)
    layers = quantized_linears(loaded.model)
    groups = {block.name: block.group for block in loaded.family.blocks(loaded.model)}
    assert len(layers) == LINEARS[module]
    for name in layers:
        assert next(group for block, group in groups.items() if name.startswith(f"{block}.")) == module
    loaded.model.float()
    wanted, found = (actions_of(one, CASES["batch"]) for one in (original, loaded))
    assert 0 < action_errors(wanted, found).max() < 0.5


def test_quant_experts_and_its_checkpoint(folder: Path, original: LoadedModel, tmp_path: Path) -> None:
    recipe = make_recipe(method="qe", modules=MODULES, options=QUICK)
    loaded, recipe = quantize(str(folder), recipe, CALIBRATION)
    assert len(quantized_linears(loaded.model)) == sum(LINEARS.values())
    save_quantized(loaded, recipe, tmp_path / "checkpoint")
    again = load_quantized(tmp_path / "checkpoint")
    for one in (loaded, again):
        one.model.float()
    found = actions_of(loaded, CASES["batch"])
    assert np.array_equal(actions_of(again, CASES["batch"]), found)
    assert 0 < action_errors(actions_of(original, CASES["batch"]), found).max() < 0.5


def test_blocks_run_alone_as_they_do_in_the_model(original: LoadedModel) -> None:
    """Also where a block runs twice, as it does when it is quantized."""
    family, model = original.family, original.model
    encoded = family.encode(original.processor, CALIBRATION, answers=True)
    blocks = family.blocks(model)
    with outputs_of(blocks) as plain, torch.no_grad():
        family.run_blocks(model, encoded, {})
    kept: dict[str, Any] = {}
    chains = chains_of(blocks)
    streamer = Streamer(model, chains, 1, lambda _: family.run_blocks(model, encoded, kept))
    for index in range(len(chains)):
        chain = streamer.record(index)
        for position, block in enumerate(chain.blocks):
            for _ in range(2):
                outputs = run_block(block.module, chain.hidden[0], chain.calls[position][0])
            chain.hidden = [outputs]
            assert torch.equal(outputs, plain[block.name]), block.name
        streamer.finish(chain)


def test_calibration_sees_the_expert_at_every_step(original: LoadedModel) -> None:
    """What enters each of its layers is what transformers' training loss sees at that time."""
    family, model = original.family, original.model
    encoded = family.encode(original.processor, CALIBRATION, answers=True)
    experts = [block for block in family.blocks(model) if block.group == "action"]
    with outputs_of(experts) as together, torch.no_grad():
        family.run_blocks(model, encoded, {})
    inputs = family.torch_inputs(encoded)
    given = {name: torch.from_numpy(encoded.pixels[name]) for name in ("actions", "noise")}
    for step in range(STEPS):
        time = torch.full((len(CALIBRATION),), 1 - step / STEPS)
        with outputs_of(experts) as alone, torch.no_grad():
            model(**inputs, **given, timestep=time)
        for block in experts:
            rows = together[block.name].reshape(len(CALIBRATION), STEPS, 1 + CHUNK, -1)[:, step]
            assert torch.allclose(rows, alone[block.name], rtol=1e-4, atol=1e-4), (block.name, step)


def test_samples_without_actions_are_said(original: LoadedModel) -> None:
    with pytest.warns(CommonNotice, match="no 'actions'"):
        encoded = original.family.encode(original.processor, [TASK], answers=True)
    assert (encoded.pixels["actions"][:, :, ACTION:] == 0).all()
    normal = original.family.encode(original.processor, CALIBRATION, answers=True).pixels["actions"][0, :, :ACTION]
    mean, deviation = (np.array(STATISTICS[f"actions_{part}"]) for part in ("mean", "std"))
    assert np.allclose(normal, (np.array(recorded(20)) - mean) / deviation, atol=1e-5)


@pytest.mark.parametrize("steps", [None, 1, 7])
@pytest.mark.parametrize("case", list(CASES))
def test_engines_equal_transformers(made: Made, case: str, steps: int | None) -> None:
    samples = CASES[case]
    wanted = actions_of(made.loaded, samples, steps)
    noises = noise_of((CHUNK, WIDTH), range(len(samples)))
    for engine in (made.engine, made.built):
        found = engine.actions(engine.encode(samples), noises, steps)
        assert np.abs(found - wanted).max() / np.abs(wanted).max() < 1e-5


def test_actions_are_in_the_robots_own_numbers(made: Made) -> None:
    samples = CASES["batch"]
    mean, deviation = (np.array(STATISTICS[f"actions_{part}"]) for part in ("mean", "std"))
    found = made.built.act(samples)
    assert found.shape == (3, CHUNK, ACTION)
    assert np.allclose(found, actions_of(made.loaded, samples)[:, :, :ACTION] * deviation + mean, atol=1e-5)
    assert np.array_equal(made.built.act(samples), found)
    assert np.allclose(made.built.act(samples[1:2], seed=1), found[1:2], atol=1e-5)
    assert np.abs(made.built.act(samples, seed=1) - found).max() > 0.1


def test_validation_reports_the_error_of_every_question(folder: Path, made: Made, tmp_path: Path, cli: Run) -> None:
    lines = []
    for number, picture in enumerate((ODD, WIDE, TALL)):
        picture.save(tmp_path / f"{number}.png")
        lines.append({"images": [f"{number}.png"], "question": f"task {number}", "state": state(number)})
    data = tmp_path / "held.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    report = validate_actions(str(folder), made.folder / "checkpoint", made.folder / "cpu", str(data))
    samples = [read_line(json.dumps(line), data, 1) for line in lines]
    wanted, found = (
        actions_of(one, samples)[:, :, :ACTION] for one in (load_model(str(folder), torch.float32), made.loaded)
    )
    errors = np.linalg.norm((found - wanted).reshape(3, -1), axis=1) / np.linalg.norm(wanted.reshape(3, -1), axis=1)
    assert [one.quantized for one in report.questions] == pytest.approx(errors, rel=1e-4)
    assert (report.quantized.mean, report.quantized.median, report.quantized.worst) == pytest.approx(
        (errors.mean(), np.median(errors), errors.max()), rel=1e-4
    )
    assert report.engine_to_quantized is not None
    assert 0 < report.engine_to_quantized.worst < 1e-5
    assert report.steps == STEPS
    assert {"language", "visual", "merger", "action"} == set(report.bits.groups)
    output = tmp_path / "report.json"
    done = cli("validate", str(folder), str(made.folder / "checkpoint"), "--evaluation", str(data), "-o", str(output))
    assert done.code == 0, done.err
    assert "task 2" in done.out
    assert "worst" in done.out
    assert json.loads(output.read_text(encoding="utf-8"))["quantized"]["mean"] == pytest.approx(errors.mean(), rel=1e-4)
    refused = cli("report", str(output), "-o", str(tmp_path / "page.html"))
    assert "report of actions, which has no page" in refused.err


def test_run_prints_actions(made: Made, tmp_path: Path, cli: Run) -> None:
    SQUARE.save(tmp_path / "a.png")
    numbers = ",".join(str(number) for number in state(0))
    asked = ("--image", tmp_path / "a.png", "--prompt", "pick it", "--state", numbers, "--seed", 3, "--steps", 2)
    wanted = made.built.act([TASK], seed=3, steps=2)[0]
    for name in ("cpu", "checkpoint"):
        done = cli("run", str(made.folder / name), *asked)
        assert done.code == 0, done.err
        found = [json.loads(line) for line in done.out.splitlines() if line.startswith("[")]
        assert np.allclose(found, wanted, atol=1e-5)
    for given, problem in (
        ((*asked[:4], "--state", "0.1,nan,1,1,1"), "holds nan"),
        ((*asked[:4], "--state", "left"), "no numbers with commas"),
        ((*asked[:4], "--state", "1,2"), "state has 2 numbers; the model was trained on 5"),
        (asked[:4], "no state of the robot"),
        (asked[2:], "there is no picture"),
        ((*asked, "--max-context", "9"), "no context to choose"),
    ):
        done = cli("run", str(made.folder / "cpu"), *given)
        assert done.code == 2
        assert problem in done.err


def test_other_doors_are_shut(made: Made, original: LoadedModel) -> None:
    with pytest.raises(ModelError, match="'deploy' has no answers"):
        check_deployable(original.family)
    for kind in (qe_edge.Pipeline.from_dir, EncoderEngine.load):
        with pytest.raises(ArtifactError, match=r"makes actions and writes no text.*actions\.ActionEngine"):
            kind(made.folder / "onnx")
    with pytest.raises(InputError, match="no limits to choose"):
        build_engines(made.folder / "onnx", made.folder / "limited", "cpu", limits=EngineLimits(batch=1))
    encoded = made.engine.encode([TASK])
    with pytest.raises(InputError, match="shape"):
        made.engine.actions(encoded, np.zeros((1, CHUNK, ACTION), np.float32))
    with pytest.raises(InputError, match="1001 steps"):
        made.engine.act([TASK], steps=1001)


def test_graphs_for_gpus_compute_the_time_in_float32(made: Made) -> None:
    """At half precision the sine of a thousand is noise; `benchmarks/family_engines.py` builds whole engines."""
    manifest = made.engine.manifest
    for name, layers in (("prefix", LINEARS["language"] - 5), ("action", LINEARS["action"])):
        graph = open_graph(made.folder / "onnx", manifest.graphs[name])
        precision = lower_for_tensorrt(graph)
        # the last layer's queries, output and perceptron make no keys and values
        assert sum(kind.startswith("int4 weights") for kind in precision.products.values()) == layers
        angles = [node for node in graph.graph if node.op_type in ("Sin", "Cos")]
        assert angles
        assert {node.inputs[0].dtype for node in angles if node.inputs[0] is not None} == {ir.DataType.FLOAT}
