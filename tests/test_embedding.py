"""An embedding of INT8 codes: its checkpoint, plan, graphs, engines and conversion."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qe_edge.checkpoint.safetensors_check import check_safetensors
from qe_edge.export.exporter import export_model
from qe_edge.formats.source import open_checkpoint
from qe_edge.layers.embedding import QuantizedEmbedding
from qe_edge.models.loading import load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.plan import make_plan
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.embedding import EMBEDDING, TokenEmbedding
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import ArtifactError, RecipeError, UnknownNameError
from tests.models.conversations import greedy, torch_logits
from tests.sealing import seal

TABLE = "model.language_model.embed_tokens"
RECIPE = make_recipe(method="rtn", scheme="w4a16", head="int4", embedding="int8", calibration={"samples": 4})


@pytest.fixture(scope="module")
def folder(small: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("embedding")
    loaded, recipe = quantize(small, RECIPE)
    save_quantized(loaded, recipe, out / "checkpoint")
    export_model(out / "checkpoint", out / "onnx")
    return out


def test_every_row_is_rounded_to_its_own_range(small: str, folder: Path) -> None:
    weight = load_model(small, torch.float32).model.get_input_embeddings().weight.detach()
    embedding = load_quantized(folder / "checkpoint").model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    largest = weight.abs().amax(1, keepdim=True)
    error = (embedding.codes.float() * embedding.scales.float().unsqueeze(1) - weight).abs()
    assert (error <= largest / 127 * 0.76).all()  # half a step, and what rounding the scale takes from the largest
    assert error.max() > 0
    assert torch.equal(embedding(torch.tensor([[3, 0]])), embedding.decode()[[3, 0]].unsqueeze(0))


def test_a_checkpoint_of_it_is_planned_and_small(small: str, folder: Path, samples: list) -> None:
    header = check_safetensors(folder / "checkpoint/model.safetensors")
    assert header[f"{TABLE}.codes"][0] == "I8"
    assert f"{TABLE}.weight" not in header
    size = (folder / "checkpoint/model.safetensors").stat().st_size
    assert abs(make_plan(small, RECIPE, samples).checkpoint_bytes - size) < 0.02 * size


def test_engines_compute_what_pytorch_does(folder: Path, samples: list) -> None:
    engine, loaded = VisionLanguageEngine.load(folder / "onnx", threads=1), load_quantized(folder / "checkpoint")
    assert check_safetensors(folder / "onnx" / EMBEDDING)["embedding"][0] == "I8"
    loaded.model.float()
    encoded = engine.encode(samples, answers=True)
    valid = encoded.attention_mask.astype(bool)
    wanted = torch_logits(loaded, samples)[valid]
    assert np.abs(engine.logits(encoded)[valid] - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert engine.generate_ids(engine.encode(samples), 6) == greedy(loaded, samples, 6)


def test_a_family_that_multiplies_its_embedding_goes_on_doing_so() -> None:
    table = torch.nn.Embedding(5, 8)
    table.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)
    rounded = QuantizedEmbedding.of(table)
    assert (rounded(torch.arange(5)) - 3 * table.weight).abs().max() < 3 * table.weight.abs().max() / 127
    assert set(rounded.state_dict()) == {"codes", "scales"}  # the number is the configuration's


def test_other_formats_get_its_decoded_rows(folder: Path) -> None:
    with open_checkpoint(folder / "checkpoint") as source:
        found = source.tensor(f"{TABLE}.weight")
        assert source.plain[f"{TABLE}.weight"].shape == found.shape
        assert not [name for name in source.plain if name.endswith((".codes", ".scales"))]
    assert torch.equal(found, load_quantized(folder / "checkpoint").model.get_input_embeddings().decode())


def test_a_head_that_is_the_same_matrix_is_needed_in_codes_too(small: str, samples: list) -> None:
    recipe = RECIPE.model_copy(update={"head": "none"})
    for work in (quantize, make_plan):
        with pytest.raises(RecipeError, match="same matrix as its embedding") as caught:
            work(small, recipe, samples)
        assert caught.value.remedy.startswith("Add --head int4.")


def test_an_unknown_grid_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="int8"):
        make_recipe(embedding="int7")


@pytest.mark.parametrize(
    "tensors",
    [
        {"embedding": torch.zeros(20, 8, dtype=torch.int8)},
        {"embedding": torch.zeros(20, 8, dtype=torch.int8), "scales": torch.ones(19)},
        {"embedding": torch.zeros(20, 8, dtype=torch.int8), "scales": torch.ones(20).half()},
        {"embedding": torch.zeros(20, 8), "scales": torch.ones(20)},
    ],
)
def test_a_table_without_its_scales_is_refused(tmp_path: Path, tensors: dict) -> None:
    save_file(tensors, tmp_path / EMBEDDING)
    with pytest.raises(ArtifactError, match="should have 20 rows of 8"):
        TokenEmbedding(tmp_path, 20, 8)


def test_codes_of_another_type_are_refused(folder: Path, tmp_path: Path) -> None:
    """Sealed as if they had been written so."""
    damaged = tmp_path / "checkpoint"
    shutil.copytree(folder / "checkpoint", damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors[f"{TABLE}.codes"] = tensors[f"{TABLE}.codes"].short()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    seal(damaged)
    with pytest.raises(ArtifactError, match="no INT8 codes with scales"):
        load_quantized(damaged)
