"""Vision encoders alone: quantized, exported, built, and their features compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import Sample
from qe_edge.models.loading import load_model
from qe_edge.models.quantized import load_quantized, save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.encoder import EncoderEngine
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.limits import EngineLimits
from qe_edge.system.errors import ArtifactError, InputError, ModelError
from qe_edge.validate.features import extract_features, mean_cosine

SIDE, PATCH, LAYERS = 56, 8, 2
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    # positions are stretched: the processor's pictures are smaller than those of training
    "dinov2": ({"mlp_ratio": 2, "image_size": 72}, BitImageProcessorPil(**CROPPED)),
    "clip_vision_model": ({"intermediate_size": 96, "image_size": SIDE}, CLIPImageProcessorPil(**CROPPED)),
    "siglip_vision_model": (
        {"intermediate_size": 96, "image_size": SIDE},
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    ),
}


def write(folder: Path, model_type: str, **changes: Any) -> Path:  # noqa: ANN401 - values of a configuration
    values, processor = MODELS[model_type]
    sizes = {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "patch_size": PATCH}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **{**sizes, **values, **changes}))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "scale" not in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(picture: Callable[[int, int], Image.Image]) -> list[Sample]:
    """More than an engine takes at a time."""
    return [Sample(picture(40 + 10 * number, 60), "") for number in range(9)]


@pytest.mark.parametrize("model_type", list(MODELS))
def test_features_of_the_engine_are_those_of_transformers(
    model_type: str, pictures: list[Sample], tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", model_type)
    original = load_model(str(folder), torch.float32)
    cosines = []
    for method, scheme in (("rtn", "w4a16"), ("qe", "w4a8"))[: 2 if model_type == "dinov2" else 1]:
        options = {"tokens": 128, "em_steps": 1} if method == "qe" else {}
        recipe = make_recipe(method=method, scheme=scheme, modules=("visual",), options=options)
        save_quantized(*quantize(str(folder), recipe, pictures), tmp_path / "checkpoint")
        loaded = load_quantized(tmp_path / "checkpoint")
        loaded.model.float()
        assert len(quantized_linears(loaded.model)) == LAYERS * 6
        export_model(tmp_path / "checkpoint", tmp_path / "onnx")
        build_engines(tmp_path / "onnx", tmp_path / "engines", "cpu")
        engine = EncoderEngine.load(tmp_path / "engines", threads=1)
        assert engine.manifest.quantization == f"{method} {scheme}"
        wanted, found = (extract_features(source, pictures) for source in (loaded, engine))
        if scheme == "w4a16":
            assert (found.patches - wanted.patches).abs().max() / wanted.patches.abs().max() < 1e-5
        assert min(mean_cosine(wanted, found).values()) > 0.9999
        cosines.append(min(mean_cosine(extract_features(original, pictures), found).values()))
    assert 0.9 < min(cosines) < 1 - 1e-5
    with pytest.raises(ArtifactError, match="vision encoder that writes no text"):
        VisionLanguageEngine.load(tmp_path / "engines")
    with pytest.raises(InputError, match="no picture"):
        engine.encode([])
    with pytest.raises(InputError, match="no limits to choose"):
        build_engines(tmp_path / "onnx", tmp_path / "more", "cpu", limits=EngineLimits(batch=2))


def test_pictures_that_keep_their_shapes_have_no_graph(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", "dinov2")
    BitImageProcessorPil(size={"shortest_edge": SIDE}, do_center_crop=False).save_pretrained(folder)
    with pytest.raises(ModelError, match="keeps the shapes of pictures"):
        export_model(load_model(str(folder)), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model"])
def test_pictures_of_another_size_are_refused(model_type: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", model_type, image_size=SIDE + PATCH)
    with pytest.raises(ModelError, match=r"size is .56, 56.; the vision encoder of config.json has .64, 64."):
        load_model(str(folder))


def test_an_engine_of_answers_is_no_encoder(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(1))
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        EncoderEngine.load(tmp_path)
