"""LLaVA-OneVision: tiles, tokens and features as transformers' classes make them, and every family's checks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionModel,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from qe_edge.demo import model_path
from qe_edge.models.anyres import tokens_of_frame, tokens_of_picture
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.llava_onevision import LlavaOnevision
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.runtime.limits import EngineLimits, check_limits, with_limits
from qe_edge.runtime.manifest import read_manifest
from qe_edge.runtime.picture_limits import warn_of_pictures
from qe_edge.system.errors import InputError, ModelError, QENotice
from tests.models.conversations import ODD, SQUARE, TALL, WIDE, noise
from tests.models.families import LARGE_SIZES, SAMPLES, FamilyChecks, Made, check_settings, token_errors
from tests.models.random_models import save_random_model
from tests.models.video_checks import EVEN, UNEVEN, VideoChecks, film, video_cases

TILE, PATCH = 44, 8  # a tile is 5.5 patches wide, as SigLIP's of 384 pixels is 27.4
SIDE = TILE // PATCH
RESOLUTIONS = [[rows * TILE, columns * TILE] for rows in range(1, 4) for columns in range(1, 4)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'video' %}<video>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path, **changes: Any) -> Path:  # noqa: ANN401 - values of a configuration
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    tokenizer.chat_template = TEMPLATE
    text = {
        "model_type": "qwen2",
        "vocab_size": 528,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": TILE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    values = {"vision_aspect_ratio": "anyres_max_2", **changes}  # so that large pictures are scaled down
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=RESOLUTIONS,
        **values,
    )
    save_random_model(LlavaOnevisionForConditionalGeneration, config, tokenizer, folder, norms=(0.5, 1.5))
    LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=RESOLUTIONS
    ).save_pretrained(folder)
    return folder


def plain(loaded: LoadedModel) -> Any:  # noqa: ANN401 - transformers' own class
    """The same weights in a model that is all transformers' own."""
    model: Any = copy.deepcopy(loaded.model)
    for name in ("forward", "get_video_features"):
        assert model.model.__dict__.pop(name) is not None
    return model


class TestLlavaOnevision(VideoChecks, FamilyChecks):
    """transformers prepares videos of one length together, and no others."""

    processor_class = LlavaOnevisionProcessor
    video_processor = "llava_onevision"
    processor_options = {  # noqa: RUF012
        "num_image_tokens": SIDE**2,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    }
    video_cases = video_cases(film(5, 84, 64, 2.0), film(5, 117, 90, 3.0), film(5, 150, 60, 1.5))
    samples = (*SAMPLES, Sample((SQUARE, EVEN, ODD), "is it in the video?", "no"), Sample(UNEVEN, "what?", "red"))
    linears = {"visual": 2 * 6, "merger": 2, "language": 2 * 7}  # noqa: RUF012
    test_validation = None  # type: ignore[assignment] # as of the other families of tiles, which it would repeat

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "llava_onevision")

    def nested(self, pictures: list[Image.Image]) -> list[list[Image.Image]]:
        """A sample's pictures, which are cut into tiles if there is one alone."""
        return [pictures]

    def test_prompts_are_those_of_transformers(self, original: LoadedModel) -> None:
        tokenizer, image_processor = original.processor.tokenizer, original.processor.image_processor
        with pytest.MonkeyPatch.context() as patch:  # the class asks for a video processor, which needs torchvision
            patch.setattr(LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda *_: None)
            processor = LlavaOnevisionProcessor(
                image_processor, tokenizer, None, num_image_tokens=SIDE**2, vision_feature_select_strategy="full",
                chat_template=TEMPLATE, vision_aspect_ratio="anyres_max_2",
            )  # fmt: skip
        for pictures, tiles in (((SQUARE,), 5), ((WIDE,), 4), ((WIDE, ODD), 2)):
            encoded = original.family.encode(original.processor, [Sample(pictures, "what is it?")])
            parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": "what is it?"}]
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
            )
            opened = [open_image(picture) for picture in pictures]
            wanted = processor(text=[prompt], images=[opened], return_tensors="np", add_special_tokens=False)
            assert np.array_equal(encoded.input_ids, wanted["input_ids"])
            pixels = np.asarray(wanted["pixel_values"])
            assert np.array_equal(encoded.pixels["pixel_values"], pixels.reshape(-1, *pixels.shape[-3:]))
            assert np.array_equal(encoded.pixels["image_sizes"], np.asarray(wanted["image_sizes"]))
            assert len(encoded.pixels["pixel_values"]) == tiles

    def test_videos_of_any_lengths_beside_pictures(self, made: Made) -> None:
        """A model of transformers takes those of one length alone; here shorter ones are filled up."""
        samples = [
            Sample((EVEN, UNEVEN), "what differs?", "red"),
            Sample((SQUARE, film(1, 40, 44, 2.0)), "is it?", "no"),
        ]
        assert token_errors(made, samples).max() < 1e-5
        single = [Sample(film(1, 40, 44, 2.0), "is it?", "no"), Sample((ODD, SQUARE), "what?", "red")]
        assert token_errors(made, single).max() < 1e-5
        encoded = made.engine.encode(samples)
        inputs, model = made.loaded.family.torch_inputs(encoded), plain(made.loaded).model
        videos = inputs["pixel_values_videos"]
        assert videos.shape[:2] == (3, 6)
        assert videos.isnan().flatten(2).all(2).sum(1).tolist() == [0, 1, 5]
        with torch.no_grad():
            found = made.loaded.model.model.get_video_features(videos).pooler_output[0]
            counts = encoded.pixels["frames"].tolist()
            wanted = [
                model.get_video_features(video[None, :count]).pooler_output[0]
                for video, count in zip(videos, counts, strict=True)
            ]
        assert [len(video) for video in wanted] == [6 * 9 + 1, 5 * 9 + 1, 9 + 1]
        assert (found - torch.cat(wanted)).abs().max() < 1e-5

    def test_frames_are_encoded_one_by_one(self, made: Made) -> None:
        encoded = made.engine.encode(self.video_cases["video and picture"])
        feeds = made.loaded.family.visual_feeds(encoded)
        assert [len(feed["pixel_values"]) for feed in feeds] == [2, 1, 1, 1, 1, 1]
        assert sum(len(feed["token_places"]) for feed in feeds) == encoded.image_mask.sum()
        check_limits(EngineLimits(tiles=7), encoded, 1)
        with pytest.raises(InputError, match="7 tiles: it was built for 6"):
            check_limits(EngineLimits(tiles=6), encoded, 1)

    @pytest.mark.parametrize("most", [1, 9])
    def test_the_picture_graph_of_other_limits(self, original: LoadedModel, most: int, tmp_path: Path) -> None:
        config = copy.deepcopy(original.model.config)
        config.vision_aspect_ratio = f"anyres_max_{most}"
        check_settings(LlavaOnevision(config), original.processor, tmp_path)

    def test_the_picture_graph_of_released_models(self, original: LoadedModel, tmp_path: Path) -> None:
        """Tiles of 384 pixels and up to 6 x 6 of them; and with a mean whose channels differ, beside others."""
        config = LlavaOnevisionConfig(image_token_index=original.model.config.image_token_id)
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        for settings, sizes in ((half, LARGE_SIZES), ({"resample": 2}, ((480, 640), (97, 57)))):
            image_processor = LlavaOnevisionImageProcessorPil(**settings)
            processor = replace(original.processor, image_processor=image_processor)
            check_settings(LlavaOnevision(config), processor, tmp_path, sizes)
        cropping = LlavaOnevisionImageProcessorPil(do_center_crop=True)
        assert LlavaOnevision(config).picture_graph(replace(processor, image_processor=cropping)) is None

    def test_limits_count_tiles_and_their_tokens(self, made: Made) -> None:
        manifest = read_manifest(made.onnx)
        graphs = with_limits(manifest, EngineLimits(tiles=4)).graphs
        sizes = {
            spec.name: graphs[graph].profiles["default"][spec.name][2]
            for graph in ("visual", "merger")
            for spec in graphs[graph].inputs
        }
        tokens = 4 * (SIDE**2 + SIDE)
        assert sizes == {
            "pixel_values": (4, 3, TILE, TILE),
            "token_places": (tokens, 4),
            "token_weights": (tokens, 4),
            "hidden_states": (tokens, 4, 49),
        }
        with pytest.warns(QENotice, match="up to 10 tiles, these engines take 4"):
            warn_of_pictures(with_limits(manifest, EngineLimits(tiles=4)), made.engine.processor.image_processor)


@pytest.mark.parametrize("most", [1, 2, 9])
def test_tokens_are_packed_as_transformers_packs_features(most: int) -> None:
    """On patches of which each has its own number, and lines that end with -1."""
    size = {"image_size": TILE, "patch_size": PATCH}
    packer = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config={"model_type": "siglip_vision_model", "num_hidden_layers": 1, **size},
            text_config={"model_type": "qwen2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8},
            image_grid_pinpoints=RESOLUTIONS,
        )
    ).model
    for picture in (SQUARE, WIDE, TALL, ODD, noise(1, 90), noise(333, 334)):
        height, width = picture.height, picture.width
        tokens = tokens_of_picture((height, width), [tuple(r) for r in RESOLUTIONS], TILE, SIDE, most)
        values = torch.arange(10 * SIDE**2, dtype=torch.float32)
        wanted, _ = packer.pack_image_features(
            [values.reshape(-1, SIDE**2, 1)[: _tiles(height, width)]],
            torch.tensor([[height, width]]),
            torch.tensor([-1.0]),
            f"anyres_max_{most}",
        )
        ends = 1 - tokens.weights.sum(1)
        found = (values.numpy()[tokens.places] * tokens.weights).sum(1) - ends
        np.testing.assert_allclose(found, wanted[0][:, 0].numpy(), atol=2e-4)


@pytest.mark.parametrize("side", [1, 2, 5, 27])
def test_a_frame_is_scaled_down_as_transformers_pools_it(side: int) -> None:
    values = torch.randn(side**2, 7, generator=torch.Generator().manual_seed(side))
    vision = SimpleNamespace(image_size=14 * side + 6, patch_size=14)
    model: Any = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    wanted = LlavaOnevisionModel.apply_pooling(model, values[None])[0].numpy()
    tokens = tokens_of_frame(side)
    np.testing.assert_allclose(
        (values.numpy()[tokens.places] * tokens.weights[..., None]).sum(1), wanted, atol=1e-5
    )  # exact with FMA


def _tiles(height: int, width: int) -> int:
    found: int = image_size_to_num_patches((height, width), RESOLUTIONS, TILE)
    return found


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("image_token_index", 600, "image_token_index 600 is outside the vocabulary of 528"),
        ("vision_aspect_ratio", "pad", "vision_aspect_ratio"),
        ("vision_feature_layer", -2, r"reads layer -2 \('full'\)"),
        ("image_grid_pinpoints", RESOLUTIONS[:3], "image_grid_pinpoints is"),
    ],
)
def test_settings_that_do_not_fit(key: str, value: object, problem: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), key: value}), encoding="utf-8")
    with pytest.raises(ModelError, match=problem):
        load_model(str(folder))
