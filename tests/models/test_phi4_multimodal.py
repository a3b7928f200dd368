"""Phi-4-multimodal: prompts and answers of transformers' own image processor and model, and every family's checks."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalImageEmbedding
from transformers.models.phi4_multimodal.processing_phi4_multimodal import Phi4MultimodalProcessor

from qe_edge.demo import model_path
from qe_edge.export.attention import attach_attention
from qe_edge.export.build import build_engines
from qe_edge.export.lowering.tensorrt import lower_for_tensorrt
from qe_edge.export.plain_linears import attach_plain_linears
from qe_edge.export.tracing import exportable, trace_graph
from qe_edge.models.configuration import load_family
from qe_edge.models.family import ModelFamily, Sample
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.phi4_multimodal_processor import Phi4MultimodalImageProcessorPil
from qe_edge.models.phi4_multimodal_projector import ATTENTION, projector_of
from qe_edge.models.videos import Video
from qe_edge.runtime.limits import EngineLimits
from qe_edge.runtime.picture_limits import warn_of_pictures
from qe_edge.runtime.sessions import OrtSession
from qe_edge.system.errors import InputError, ModelError, QENotice
from tests.models.conversations import CASES, SQUARE, noise
from tests.models.families import LARGE_SIZES, PICTURE_SIZES, TOKENS, FamilyChecks, Made, check_settings
from tests.models.model_files import copy_files, edit
from tests.models.random_models import save_random_model
from tests.models.real_processors import image_class, torch_alone

SIDE, PATCH = 56, 14
SETTINGS: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, "patch_size": PATCH, "dynamic_hd": 12}
MARKS = {"image_token": "<|image|>", "audio_token": "<|audio|>"}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% else %}"
    "<|image|>{% endif %}{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AUDIO = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 16,
}


def write(folder: Path, settings: dict[str, Any] = SETTINGS, **changes: Any) -> Path:  # noqa: ANN401 - read only
    """A model with the heads of the real one: 16 of pictures and 24 of texts, 8 of them with keys and values."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(), extra_special_tokens=MARKS)
    tokenizer.chat_template = TEMPLATE
    vision = {
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "patch_size": PATCH,
        "image_size": SIDE,
        "crop_size": SIDE,
        "image_token_id": tokenizer.image_token_id,
        **changes.pop("vision", {}),
    }
    values = {
        "vocab_size": 576,
        "hidden_size": 192,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.2, 1.5],
            "long_factor": [1.0, 8.0, 32.0],
        },
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
        "vision_config": vision,
        "audio_config": {**AUDIO, "audio_token_id": tokenizer.audio_token_id},
    }
    config = AutoConfig.for_model("phi4_multimodal", **{**values, **changes})
    save_random_model(AutoModelForCausalLM.from_config, config, tokenizer, folder, norms=(0.1, 0.9))
    Phi4MultimodalImageProcessorPil(**settings).save_pretrained(folder)
    return folder


def real_inputs(family: ModelFamily, processor: Any, samples: list[Sample]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """What transformers' own combined processor makes of samples, with the settings and tokenizer of another."""
    prompts = [family.chat_text(processor, sample.conversation) for sample in samples]
    pictures = [open_image(picture) for sample in samples for picture in sample.pictures]
    settings = {key: getattr(processor.image_processor, key) for key in SETTINGS}
    with torch_alone():
        real = Phi4MultimodalProcessor(image_class("phi4_multimodal")(**settings), None, processor.tokenizer)
        return dict(real(text=prompts, images=pictures or None, padding=True, return_tensors="pt"))


def check_pictures(processor: Any, sizes: Iterator[tuple[int, int]]) -> int:  # noqa: ANN401 - transformers' own class
    """Compare crops, masks and sizes of pictures with transformers' own to the last bit, and count those refused."""
    settings, refused = {key: getattr(processor, key) for key in SETTINGS}, 0
    with torch_alone():
        real = image_class("phi4_multimodal")(**settings)
        for height, width in sizes:
            picture = noise(width, height)
            try:
                wanted = real(images=[picture], return_tensors="np")
            except ValueError:
                with pytest.raises(ValueError, match="so narrow that scaling makes it"):
                    processor(images=[picture])
                refused += 1
                continue
            found = processor(images=[picture])
            assert np.array_equal(found["pixel_values"], wanted["image_pixel_values"][0]), (height, width)
            assert np.array_equal(found["patch_mask"], wanted["image_attention_mask"][0]), (height, width)
            assert np.array_equal(found["image_sizes"], wanted["image_sizes"]), (height, width)
    return refused


def plain(loaded: LoadedModel) -> Any:  # noqa: ANN401 - transformers' own class
    """The same weights in a model that is all transformers' own, with eager attention."""
    model: Any = copy.deepcopy(loaded.model)
    name, _ = projector_of(model)
    embedding = model.get_submodule(name)
    embedding.__class__ = Phi4MultimodalImageEmbedding
    del embedding.__dict__["projector"]
    for module in model.modules():
        if type(module).__name__ == ATTENTION:
            module.is_causal = True
    model.set_attn_implementation("eager")
    return model


class TestPhi4Multimodal(FamilyChecks):
    linears = {"visual": 2 * 6, "merger": 2, "language": 2 * 4}  # noqa: RUF012
    unrotated = 2  # three quarters of a head are rotated

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "phi4_multimodal")

    @pytest.mark.parametrize("case", list(CASES))
    def test_engines_equal_transformers_own_model(self, made: Made, case: str) -> None:
        """Logits to 1e-5 and greedy tokens; nothing of ours computes what is wanted of the inputs."""
        family, model = made.loaded.family, plain(made.loaded)
        encoded = made.engine.encode(CASES[case])
        inputs = family.torch_inputs(encoded)
        with torch.no_grad():
            wanted = model(**inputs).logits.numpy()
        valid = encoded.attention_mask.astype(bool)
        for engine in (made.engine, made.built):
            assert np.abs(engine.logits(encoded) - wanted)[valid].max() < 1e-5 * np.abs(wanted[valid]).max()
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[:, encoded.input_ids.shape[1] :]
        end = made.loaded.processor.tokenizer.eos_token_id
        answers = [answer[: answer.index(end)] if end in answer else answer for answer in ids.tolist()]
        assert made.built.generate_ids(encoded, TOKENS) == answers

    def test_one_picture_is_seen_as_it_is_beside_one_with_filling(self, original: LoadedModel) -> None:
        """Transformers' SDPA makes attention causal where no crop of a call has filling; ours never is."""
        questions = [Sample(SQUARE, "what shape?"), Sample(noise(300, 60), "what shape?")]
        family, rows = original.family, []
        for samples in (questions[:1], questions):
            inputs = family.torch_inputs(family.encode(original.processor, samples))
            with torch.no_grad():
                rows.append(original.model(**inputs).logits[0, -1])
        assert (rows[0] - rows[1]).abs().max() < 1e-5 * rows[1].abs().max()

    def test_pictures_equal_transformers_own(self, original: LoadedModel) -> None:
        sizes = [size for size in PICTURE_SIZES if max(size) < 1000]
        assert check_pictures(original.processor.image_processor, iter(sizes)) > 0
        released = Phi4MultimodalImageProcessorPil()
        wide = [(480, 640), (448, 449), (600, 300), (1080, 1920), (60, 3000), (2000, 100), (3000, 3000), (5, 3000)]
        assert check_pictures(released, iter(wide)) == 1

    def test_prompts_equal_transformers_own(self, original: LoadedModel) -> None:
        """Its processor counts the tokens of crops of 448 pixels, whatever the settings say."""
        family = load_family(original.source)
        for key in ("crop_size", "image_size"):
            setattr(family.config.vision_config, key, 448)
        family.config.rope_parameters["original_max_position_embeddings"] = 8192
        processor = replace(original.processor, image_processor=Phi4MultimodalImageProcessorPil())
        for case in ("text only", "odd sizes", "two pictures", "several turns"):
            inputs = real_inputs(family, processor, CASES[case])
            ours = family.torch_inputs(family.encode(processor, CASES[case]))
            assert set(ours) - set(inputs) == {"position_ids"}
            for name, value in ours.items():
                assert name == "position_ids" or torch.equal(inputs[name].to(value.dtype), value), (case, name)

    @pytest.mark.parametrize(("most", "refused"), [(1, 3), (5, 2), (36, 2)])
    def test_the_picture_graph_of_other_grids(
        self, original: LoadedModel, most: int, refused: int, tmp_path: Path
    ) -> None:
        processor = replace(
            original.processor, image_processor=Phi4MultimodalImageProcessorPil(**{**SETTINGS, "dynamic_hd": most})
        )
        assert check_settings(load_family(original.source), processor, tmp_path) == refused

    def test_the_picture_graph_of_released_models(self, original: LoadedModel, tmp_path: Path) -> None:
        family = load_family(original.source)
        for key in ("crop_size", "image_size"):
            setattr(family.config.vision_config, key, 448)
        family.config.rope_parameters["original_max_position_embeddings"] = 1 << 17
        processor = replace(original.processor, image_processor=Phi4MultimodalImageProcessorPil())
        assert check_settings(family, processor, tmp_path, (*LARGE_SIZES, (5, 3000))) == 1

    def test_crops_of_the_real_size(self, tmp_path: Path) -> None:
        """The features of a picture, and of a column with an odd number of patches; no tensor holds scores."""
        crops: dict[str, Any] = {
            "vision": {"image_size": 448, "crop_size": 448},
            "original_max_position_embeddings": 8192,
        }
        loaded = load_model(str(write(tmp_path / "model", settings={}, **crops)), torch.float32)
        encoded = loaded.family.encode(loaded.processor, [Sample((noise(640, 480), noise(100, 900)), "what differs?")])
        inputs = loaded.family.torch_inputs(encoded)
        own = plain(loaded).model.embed_tokens_extend.image_embed
        ids = inputs["input_ids"]
        pictures = {name: value for name, value in inputs.items() if name.startswith("image_")}
        with torch.no_grad():
            wanted = own(ids, torch.zeros(*ids.shape, 192), **pictures)[ids == loaded.family.image_token_id]
        with exportable(loaded.model) as linears:
            specs = {spec.name: spec for spec in loaded.family.graphs(loaded.model)}
            visual, merger = (trace_graph(specs[name]) for name in ("visual", "merger"))
            for graph in (visual, merger):
                attach_plain_linears(graph, linears)
        kinds = [node.op_type for node in visual.graph]
        assert (kinds.count("MultiHeadAttention"), kinds.count("Softmax")) == (2, 0)
        attach_attention(visual)
        (feed,) = loaded.family.visual_feeds(encoded)
        for graph in (visual, merger):
            session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
            found = np.asarray(session.run(None, feed)[0])
            feed = {"hidden_states": found}
        assert found.shape == wanted.shape
        assert np.abs(found - wanted.numpy()).max() < 1e-5 * wanted.abs().max()

    def test_the_visual_graph_of_engines_for_gpus(self, made: Made) -> None:
        """In float16, whose types fit together; filling counts for nothing there too."""
        model = ir.external_data.load_to_model(ir.load(made.onnx / "visual.onnx"))
        lower_for_tensorrt(model)
        (feed,) = made.loaded.family.visual_feeds(made.engine.encode(CASES["odd sizes"]))
        assert 0 < feed["patch_mask"].mean() < 1
        lowered = ort.InferenceSession(ir.to_proto(model).SerializeToString())
        canonical = OrtSession(made.onnx, made.engine.manifest.graphs["visual"], accuracy_level=0, threads=1)
        found, (wanted,) = np.asarray(lowered.run(None, feed)[0]), canonical.run(feed).values()
        assert np.abs(found - wanted).max() < 0.01 * np.abs(wanted).max()

    def test_no_text_is_longer_than_the_short_factors_hold(self, made: Made, tmp_path: Path) -> None:
        assert made.engine.manifest.max_context == 2048
        with pytest.raises(InputError, match="the model reads 2048"):
            made.engine.encode([Sample(None, "is it red? " * 700)])
        with pytest.raises(InputError, match="attends to 2048 tokens, 4096 are asked for"):
            build_engines(made.onnx, tmp_path / "engines", "cpu", limits=EngineLimits(context=4096))

    def test_pictures_that_are_larger_than_engines_take_are_told(self, made: Made) -> None:
        warn_of_pictures(made.engine.manifest, made.engine.processor.image_processor)
        with pytest.warns(QENotice, match="pictures of up to 37 tiles, these engines take 16"):
            warn_of_pictures(made.engine.manifest, Phi4MultimodalImageProcessorPil())

    def test_a_picture_that_is_too_narrow_is_refused(self, original: LoadedModel) -> None:
        narrow = Sample(np.zeros((3, 900, 3), np.uint8), "what?", origin="line 3")
        with pytest.raises(InputError, match=r"line 3: .*so narrow that scaling makes it 672x2 .*Crop or scale"):
            original.family.encode(original.processor, [narrow])

    def test_videos_are_refused(self, original: LoadedModel) -> None:
        with pytest.raises(InputError, match="This model reads no videos here"):
            original.family.encode(original.processor, [Sample(Video([SQUARE] * 2, 2.0), "what moves?")])

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"crop_size": 112}, "crop_size is 112, and positions are learnt for crops of 56"),
            ({"image_size": 70, "crop_size": 70}, "image_size 70 is no multiple of pixels of a pair of patches, 28"),
            ({"patch_size": [14, 14]}, r"patch_size \[14, 14\] is no one number"),
            ({"feature_layer": -4}, "feature_layer -4 names none of the vision encoder's 3 layers"),
            ({"feature_layer": 0}, "feature_layer 0 names none of the vision encoder's 3 layers"),
            ({"image_token_id": 600}, "image_token_id 600 is outside the vocabulary of 576"),
            ({"hidden_size": 130}, "width 130 is no multiple of the vision encoder's number of heads 16"),
        ],
        ids=str,
    )
    def test_configurations_that_no_model_has(
        self, folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
    ) -> None:
        copied = copy_files(folder, tmp_path / "model")
        edit(copied / "config.json", lambda table: table["vision_config"].update(changes))
        with pytest.raises(ModelError, match=complaint):
            load_family(str(copied))

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"patch_size": 28}, "patch_size is 28; the vision encoder of config.json has 14"),
            (
                {"size": {"height": 112, "width": 112}},
                r"size is \[112, 112\]; the vision encoder of config.json has \[56",
            ),
            ({"size": {"height": 56, "width": 112}}, "56 x 112 is no square of pairs of patches"),
            ({"dynamic_hd": 10**6}, "Key 'dynamic_hd' of"),
            ({"resample": 2}, "Key 'resample' of"),
            ({"do_normalize": False}, "Key 'do_normalize' of"),
        ],
        ids=str,
    )
    def test_image_processors_of_another_model(
        self, folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
    ) -> None:
        copied = copy_files(folder, tmp_path / "model")
        edit(copied / "preprocessor_config.json", lambda table: table.update(changes))
        with pytest.raises(ModelError, match=complaint):
            load_family(str(copied)).load_processor(str(copied))

    def test_a_folder_without_an_image_processor_is_refused(self, folder: Path, tmp_path: Path) -> None:
        copied = Path(shutil.copytree(folder, tmp_path / "model"))
        (copied / "preprocessor_config.json").unlink()
        with pytest.raises(ModelError, match=r"has no image processor: preprocessor_config\.json is missing"):
            load_model(str(copied))
