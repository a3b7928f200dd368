"""A vision encoder alone: encoding, quantizing, checkpoint, and clear refusals of what needs text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qe_edge.calibration.sensitivity import output_gradients
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Sample
from qe_edge.models.groups import linear_groups
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.plan import make_plan
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ArtifactError, InputError, ModelError, RecipeError
from qe_edge.validate.subjects import TorchSubject
from qe_edge.validate.text import predict
from tests.sealing import seal
from tests.small_models import LAYERS, PATCH, PICTURE, write_small_dinov2

LINEARS = LAYERS * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dinov2(tmp_path_factory.mktemp("dinov2") / "model")


@pytest.fixture
def pictures(picture: Callable[[int, int], Image.Image]) -> list[Sample]:
    """Of different sizes, with questions or without."""
    return [Sample(picture(64, 64), ""), Sample(picture(90, 40), "what?", "that"), Sample(picture(30, 100), "")]


def features_of(loaded: LoadedModel, samples: list[Sample]) -> torch.Tensor:
    inputs = loaded.family.torch_inputs(loaded.family.encode(loaded.processor, samples, answers=True))
    with torch.no_grad():
        hidden: torch.Tensor = loaded.model(**inputs).last_hidden_state
    return hidden


def test_siblings_share_their_input(folder: Path) -> None:
    loaded = load_model(str(folder))
    blocks = loaded.family.blocks(loaded.model)
    assert [block.group for block in blocks] == ["visual"] * LAYERS
    assert sorted(len(group.names) for group in linear_groups(blocks[0], loaded.family.siblings)) == [1, 1, 1, 3]


@pytest.mark.parametrize("method", ["rtn", "qe"])
def test_quantize_save_and_reload(folder: Path, pictures: list[Sample], tmp_path: Path, method: str) -> None:
    original = features_of(load_model(str(folder)), pictures)
    options = {"tokens": 128, "em_steps": 1} if method == "qe" else {}
    recipe = make_recipe(method=method, modules=("visual",), options=options)
    loaded, recipe = quantize(str(folder), recipe, pictures * 4)
    assert len(quantized_linears(loaded.model)) == LINEARS
    features = features_of(loaded, pictures)
    assert 0 < (features - original).square().mean() / original.square().mean() < 0.2
    save_quantized(loaded, recipe, tmp_path / "checkpoint")
    assert torch.equal(features_of(load_quantized(tmp_path / "checkpoint"), pictures), features)


def test_a_rotation_in_an_encoders_checkpoint_is_damage(folder: Path, pictures: list[Sample], tmp_path: Path) -> None:
    recipe = make_recipe(method="rtn", modules=("visual",))
    save_quantized(*quantize(str(folder), recipe, pictures), tmp_path / "checkpoint")
    file = tmp_path / "checkpoint" / "model.safetensors"
    save_file(load_file(file) | {"model.norm.mixing.weight": torch.zeros(8, 8)}, file, metadata={"format": "pt"})
    seal(tmp_path / "checkpoint")
    with pytest.raises(ArtifactError, match="it is rotated"):
        load_quantized(tmp_path / "checkpoint")


def test_plan_counts_layers_and_the_memory_of_patches(folder: Path, pictures: list[Sample]) -> None:
    recipe = make_recipe(method="rtn", modules=("visual",))
    few, many = (make_plan(str(folder), recipe, pictures * count) for count in (8, 800))
    assert len(few.layers) == LINEARS
    patches = (PICTURE // PATCH) ** 2 * len(pictures) * (800 - 8)
    assert many.memory_bytes - few.memory_bytes > patches * (4 * 3 * PATCH**2 + 4 * 32)


def test_language_is_refused_and_visual_named(folder: Path, pictures: list[Sample]) -> None:
    with pytest.raises(RecipeError, match=r"no language module.*--modules visual"):
        quantize(str(folder), make_recipe(method="rtn"), pictures)


def test_what_needs_text_is_refused(folder: Path, pictures: list[Sample]) -> None:
    loaded = load_model(str(folder))
    encoded = loaded.family.encode(loaded.processor, pictures)
    with pytest.raises(InputError, match="pictures only"):
        loaded.family.encode(loaded.processor, [Sample(None, "what?")])
    with pytest.raises(ModelError, match="no text"):
        TorchSubject(loaded)
    with pytest.raises(ModelError, match="predicts no tokens"):
        predict(loaded, [encoded], "text")


def test_a_folder_without_image_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelError, match="image processor"):
        load_model(str(bare))


def test_gradients_are_of_the_distance_of_the_features(folder: Path, pictures: list[Sample]) -> None:
    """Noise at a layer's output costs what the energy of its gradients says."""
    loaded = load_model(str(folder), torch.float32)
    encoded = loaded.family.encode(loaded.processor, pictures)
    block = loaded.family.blocks(loaded.model)[0]
    name = linear_groups(block, loaded.family.siblings)[-1].names[-1]
    module = dict(loaded.model.named_modules())[name]
    draws = [output_gradients(loaded, [encoded], [name], loss="predictions", seed=seed)[name] for seed in range(40)]
    outputs, energy = len(draws[0].channels), float(np.mean([one.energy for one in draws]))

    def directions() -> torch.Tensor:
        with torch.no_grad():
            states = loaded.model(**loaded.family.torch_inputs(encoded)).last_hidden_state
        return torch.nn.functional.normalize(states.double(), dim=-1)

    before, generator, size, found = directions(), torch.Generator().manual_seed(0), 1e-3, []
    for _ in range(40):
        handle = module.register_forward_hook(lambda _m, _i, y: y + size * torch.randn(y.shape, generator=generator))
        moved = (directions() - before).square().sum(-1)
        handle.remove()
        found.append(float((moved[:, 0] + moved[:, 1:].mean(1)).mean()))
    assert np.mean(found) == pytest.approx(energy * size**2 * outputs, rel=0.15)


def with_preprocessor(folder: Path, copy: Path, **values: object) -> LoadedModel:
    shutil.copytree(folder, copy)
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    return load_model(str(copy))


def test_pictures_that_become_smaller_than_a_patch(folder: Path, pictures: list[Sample], tmp_path: Path) -> None:
    loaded = with_preprocessor(
        folder, tmp_path / "model", do_center_crop=False, size={"height": PATCH * 2, "width": PATCH - 1}
    )
    with pytest.raises(InputError, match=rf"{PATCH * 2} x {PATCH - 1} pixels .* {PATCH} x {PATCH}") as error:
        features_of(loaded, pictures)
    assert "larger size in preprocessor_config.json" in error.value.remedy


def test_pictures_that_become_arrays_of_two_shapes(folder: Path, pictures: list[Sample], tmp_path: Path) -> None:
    loaded = with_preprocessor(folder, tmp_path / "model", do_center_crop=False, size={"shortest_edge": PICTURE})
    assert len(features_of(loaded, pictures[:1])) == 1
    with pytest.raises(InputError, match=r"A picture becomes an array of 3 x .* and one before it of 3 x ") as error:
        features_of(loaded, pictures)
    assert "do_center_crop" in error.value.remedy
