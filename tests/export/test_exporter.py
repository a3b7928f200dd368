from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from transformers import Qwen2Config

from qe_edge.export import exporter
from qe_edge.export.exporter import export_model
from qe_edge.export.tracing import exportable
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.decoder import Decoder, decoder_graph
from qe_edge.models.family import Sample
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.manifest import GRAPHS
from qe_edge.system.errors import ArtifactError, ModelError
from tests.conftest import Exported, Exports
from tests.export.single_layers import relative_error

TOLERANCE = 1e-3


def float32(loaded: LoadedModel) -> LoadedModel:
    loaded.model.float()
    return loaded


def assert_same(
    engine: VisionLanguageEngine, loaded: LoadedModel, samples: list[Sample], tolerance: float = TOLERANCE
) -> None:
    """Logits of every valid token, and greedy answers."""
    encoded = engine.encode(samples, answers=True)
    with torch.no_grad():
        expected = loaded.model(**loaded.family.torch_inputs(encoded)).logits.numpy()
    valid = encoded.attention_mask == 1
    assert relative_error(engine.logits(encoded)[valid], expected[valid]) < tolerance
    encoded = engine.encode(samples)
    tokens = loaded.model.generate(  # type: ignore[operator]
        **loaded.family.torch_inputs(encoded), max_new_tokens=5, do_sample=False
    )[:, encoded.input_ids.shape[1] :]
    ends = engine.manifest.eos_token_ids
    expected_ids = [[*row[: next((i for i, t in enumerate(row) if t in ends), len(row))]] for row in tokens.tolist()]
    assert engine.generate_ids(encoded, 5) == expected_ids


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("qe", "w4a8"),
        pytest.param("qe", "w4a16", marks=pytest.mark.slow),
        pytest.param("qe", "w3a16", marks=pytest.mark.slow),
        pytest.param("rtn", "w4a8", marks=pytest.mark.slow),
    ],
)
def test_graphs_equal_the_quantized_model(exports: Exports, held_out: list[Sample], method: str, scheme: str) -> None:
    made = exports(method, scheme)
    engine = VisionLanguageEngine.load(made.onnx, threads=1)
    assert engine.manifest.quantization == f"{method} {scheme}"
    assert_same(engine, float32(load_quantized(made.checkpoint)), held_out)


@pytest.mark.slow
def test_six_bit_activations(exports: Exports, held_out: list[Sample]) -> None:
    """A code of 6 bits that falls to the other side of a half moves the logits by more than 1e-3 now and then."""
    made = exports("qe", "w4a6")
    engine = VisionLanguageEngine.load(made.onnx, threads=1)
    loaded = float32(load_quantized(made.checkpoint))
    encoded = engine.encode(held_out, answers=True)
    with torch.no_grad():
        expected = loaded.model(**loaded.family.torch_inputs(encoded)).logits.numpy()
    valid = encoded.attention_mask == 1
    assert relative_error(engine.logits(encoded)[valid], expected[valid]) < 5e-3
    assert (engine.logits(encoded)[valid].argmax(-1) == expected[valid].argmax(-1)).mean() > 0.99


@pytest.mark.parametrize("sizes", [[(112, 112), (300, 80)], [(60, 200)]])
def test_pictures_of_mixed_sizes(exported: Exported, tmp_path: Path, sizes: list[tuple[int, int]]) -> None:
    from PIL import Image

    settings = json.loads((exported.onnx / "preprocessor_config.json").read_text(encoding="utf-8"))
    loaded = float32(load_quantized(exported.checkpoint))
    engine = VisionLanguageEngine.load(exported.onnx, threads=1)
    for processor in (loaded.processor, engine.processor):
        processor.image_processor.size = {**settings["size"], "longest_edge": 4 * settings["size"]["longest_edge"]}
    random = np.random.default_rng(0)
    samples = [
        Sample(Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)), "what color is it?" * (1 + index), "red")
        for index, size in enumerate(sizes)
    ]
    grids = engine.encode(samples).pixels["image_grid_thw"]
    assert len({tuple(grid) for grid in grids.tolist()}) == len(sizes)
    # noise is close to no code: many activations fall to the other side of a half
    assert_same(engine, loaded, samples, tolerance=1e-2)


def test_text_without_a_picture(exported: Exported) -> None:
    loaded = float32(load_quantized(exported.checkpoint))
    assert_same(VisionLanguageEngine.load(exported.onnx, threads=1), loaded, [Sample(None, "is it red?", "no")])


@pytest.mark.slow
def test_an_unquantized_model_has_the_same_graphs(exported: Exported, tmp_path: Path, held_out: list[Sample]) -> None:
    source = json.loads((exported.onnx / "manifest.json").read_text(encoding="utf-8"))
    loaded = load_model("demo")
    before = {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()}
    export_model(loaded, tmp_path / "onnx")
    assert {name: tensor.dtype for name, tensor in loaded.model.state_dict().items()} == before
    engine = VisionLanguageEngine.load(tmp_path / "onnx", threads=1)
    assert engine.manifest.quantization == "none"
    for name in GRAPHS[:2]:
        assert [spec["name"] for spec in source["graphs"][name]["inputs"]] == [
            spec.name for spec in engine.manifest.graphs[name].inputs
        ]
    names = {node.name for node in onnx.load(tmp_path / "onnx" / "language.onnx", load_external_data=False).graph.node}
    assert {"model.language_model.layers.3.mlp.down_proj", "lm_head"} <= names
    assert not (tmp_path / "onnx" / "recipe.json").exists()
    assert_same(engine, float32(loaded), held_out)


def test_exporting_leaves_the_model_as_it_was(exported: Exported) -> None:
    loaded = load_quantized(exported.checkpoint)
    before = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in loaded.model.state_dict().items()}
    attention = loaded.family.config.get_text_config()._attn_implementation
    with exportable(loaded.model):
        assert loaded.model.get_input_embeddings().weight.dtype == torch.float32  # type: ignore[operator]
    assert {name: (t.dtype, t.data_ptr()) for name, t in loaded.model.state_dict().items()} == before
    assert loaded.family.config.get_text_config()._attn_implementation == attention
    assert all("forward" not in vars(layer) for layer in quantized_linears(loaded.model).values())


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_pass_the_checks(exported: Exported, graph: str) -> None:
    path = exported.onnx / f"{graph}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    start = "import sys; from polygraphy.tools import main; sys.exit(main())"
    lint = subprocess.run(
        [sys.executable, "-c", start, "check", "lint", str(path)], capture_output=True, text=True, check=False
    )
    assert lint.returncode == 0, lint.stdout[-2000:]


def test_layers_keep_their_names(exported: Exported) -> None:
    layers = quantized_linears(load_quantized(exported.checkpoint).model)
    found = {}
    for graph in GRAPHS:
        for node in onnx.load(exported.onnx / f"{graph}.onnx", load_external_data=False).graph.node:
            if node.op_type == "QELinear":
                found[node.name] = graph
    assert found.keys() == layers.keys()
    assert set(found.values()) == set(GRAPHS)


def test_siblings_share_initializers(exported: Exported) -> None:
    graph = onnx.load(exported.onnx / "language.onnx", load_external_data=False).graph
    prefix = "model.language_model.layers.0.self_attn."
    nodes = {node.name: list(node.input) for node in graph.node}
    for index in (5, 7, 9):  # down, down_scale, router
        assert len({nodes[f"{prefix}{part}_proj"][index] for part in "qkv"}) == 1
    for index in (1, 2, 6, 8, 10):
        assert len({nodes[f"{prefix}{part}_proj"][index] for part in "qkv"}) == 3


def test_nothing_tells_about_the_exporting_machine(exported: Exported) -> None:
    for path in exported.onnx.iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(Path(__file__).parents[2]).encode() not in content


def test_a_failed_export_leaves_nothing(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "trace_graph", fail)
    with pytest.raises(KeyboardInterrupt):
        export_model(exported.checkpoint, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a quantized checkpoint"):
        export_model(tmp_path, tmp_path / "onnx")


def test_other_kinds_of_layers_are_refused() -> None:
    text = nn.Module()
    text.config = Qwen2Config(num_hidden_layers=2, layer_types=["full_attention", "chunked_attention"])  # type: ignore[assignment]
    with pytest.raises(ModelError, match="'chunked_attention'"):
        decoder_graph(Decoder(text, nn.Identity()))
