"""MiniCPM-V 4.6: prompts and answers of transformers' own processor and model, and every family's checks."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import MiniCPMV4_6Processor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from qe_edge.export.attention import attach_attention
from qe_edge.export.plain_linears import attach_plain_linears
from qe_edge.export.tracing import exportable, trace_graph
from qe_edge.models.configuration import load_family
from qe_edge.models.family import ModelFamily, Sample
from qe_edge.models.graph_nodes import OPSET, Nodes
from qe_edge.models.images import open_image
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.minicpmv4_6_grids import slice_grid
from qe_edge.models.picture_graphs import output
from qe_edge.models.videos import Video
from qe_edge.runtime.limits import EngineLimits, check_limits
from qe_edge.system.errors import InputError, ModelError
from tests.models.conversations import CASES, SQUARE, noise
from tests.models.families import (
    LARGE_SIZES,
    SAMPLES,
    TOKENS,
    FamilyChecks,
    Made,
    check_device_engines,
    check_settings,
    opened,
    token_errors,
)
from tests.models.minicpmv4_6_models import SETTINGS, write
from tests.models.model_files import copy_files, edit
from tests.models.real_processors import torch_alone, video_class
from tests.models.video_checks import VideoChecks, film, video_cases


def real_inputs(family: ModelFamily, processor: Any, samples: list[Sample]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """What transformers' own combined processor makes of samples, with the image processor and tokenizer of another."""
    prompts = [family.chat_text(processor, sample.conversation) for sample in samples]
    pictures = [open_image(picture) for sample in samples for picture in sample.pictures]
    mode = processor.image_processor.downsample_mode
    with torch_alone():
        videos = video_class("minicpmv4_6")(downsample_mode=mode)
        real = MiniCPMV4_6Processor(processor.image_processor, videos, processor.tokenizer)
        return dict(real(text=prompts, images=pictures or None))


def check_inputs(family: ModelFamily, processor: Any, samples: list[Sample]) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Compare our inputs with transformers' own to the last bit, and return these."""
    inputs, ours = real_inputs(family, processor, samples), family.torch_inputs(family.encode(processor, samples))
    assert set(ours) - set(inputs) == {"position_ids"}
    for name, value in inputs.items():
        assert torch.equal(ours[name], value), name
    return inputs


def plain(loaded: LoadedModel) -> Any:  # noqa: ANN401 - transformers' own class
    """The same weights in a model that is all transformers' own."""
    model: Any = copy.deepcopy(loaded.model)
    for module in (model.model, model.model.merger):
        assert module.__dict__.pop("forward") is not None
    return model


class TestMiniCPMV46(VideoChecks, FamilyChecks):
    processor_class = MiniCPMV4_6Processor
    video_processor = "minicpmv4_6"
    video_cases = video_cases(film(6, 150, 120, 2.0), film(5, 117, 90, 3.0), film(4, 300, 60, 1.5))
    samples = (*SAMPLES, Sample((SQUARE, film(5, 150, 120, 3.0)), "is it in the video?", "no"))
    linears = {"visual": 3 * 6, "merger": 2, "language": 8 + 7}  # noqa: RUF012
    unrotated = 1  # a quarter of a head is rotated

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write(tmp_path_factory.mktemp("model") / "minicpmv4_6")

    @pytest.mark.slow
    def test_graphs_round_activations_alike(self, experts: tuple[LoadedModel, Path]) -> None:
        """A code of a picture that rounds otherwise moves every later token of this model; few of a text's do."""
        made = opened(experts[1])
        assert np.median(token_errors(made, CASES["text only"])) < 1e-6
        errors = token_errors(made, CASES["several turns"])
        assert errors.min() < 1e-6
        assert errors.max() < 0.5

    def test_what_joins_patches_runs_among_the_layers(self, original: LoadedModel) -> None:
        names = [block.name.partition("model.")[2] for block in original.family.blocks(original.model)]
        tower, layers = "vision_tower", "vision_tower.encoder.layers"
        assert names[:4] == [f"{layers}.0", f"{tower}.vit_merger", f"{layers}.1", "merger.mlp.0"]

    @pytest.mark.parametrize("case", list(CASES))
    def test_engines_equal_transformers_own_processor_and_model(self, made: Made, case: str) -> None:
        """Inputs to the last bit, logits to 1e-5, greedy tokens; nothing of ours computes what is wanted."""
        inputs, model = check_inputs(made.loaded.family, made.loaded.processor, CASES[case]), plain(made.loaded)
        with torch.no_grad():
            wanted = model(**inputs, position_ids=counted_positions(inputs)).logits.numpy()
        encoded = made.engine.encode(CASES[case])
        valid = inputs["attention_mask"].bool().numpy()
        for engine in (made.engine, made.built):
            assert np.abs(engine.logits(encoded) - wanted)[valid].max() < 1e-5 * np.abs(wanted).max()
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        end = made.loaded.processor.tokenizer.eos_token_id
        answers = [answer[: answer.index(end)] if end in answer else answer for answer in ids.tolist()]
        for engine in (made.engine, made.built):
            assert engine.generate_ids(encoded, TOKENS) == answers

    def test_pictures_of_the_real_size(self, made: Made) -> None:
        """Slices of 448 pixels as the real image processor cuts them: 3 images of 640 x 480, 7 of 1344 x 896.

        Compared in float64: after so many tokens of noise float32 itself is 6e-6 away from it.
        """
        processor = replace(made.loaded.processor, image_processor=MiniCPMV4_6ImageProcessorPil())
        samples = [Sample((noise(640, 480), noise(1344, 896)), "what differs?")]
        inputs, encoded = (
            check_inputs(made.loaded.family, processor, samples),
            made.loaded.family.encode(processor, samples),
        )
        assert inputs["target_sizes"].shape == (10, 2)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            wanted = plain(made.loaded).double()(**inputs).logits.numpy()
        assert np.abs(made.engine.logits(encoded) - wanted).max() < 1e-5 * np.abs(wanted).max()

    @pytest.mark.parametrize(
        "changes", [{"slice_mode": False}, {"use_image_id": False}, {"max_slice_nums": 9}], ids=str
    )
    def test_settings_of_the_image_processor(self, original: LoadedModel, changes: dict[str, Any]) -> None:
        image_processor = MiniCPMV4_6ImageProcessorPil(**{**SETTINGS, **changes})
        processor = replace(original.processor, image_processor=image_processor)
        for width, height in [(300, 60), (56, 168), (9, 5), (1, 200), (336, 330), (240, 161)]:
            check_inputs(original.family, processor, [Sample((SQUARE, noise(width, height)), "what?")])

    @pytest.mark.parametrize(
        "changes",
        [{"slice_mode": False}, {"use_image_id": False}, {"max_slice_nums": 2}, {"downsample_mode": "4x"}],
        ids=str,
    )
    def test_the_picture_graph_of_other_settings(
        self, original: LoadedModel, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        family = load_family(original.source)
        family.config.downsample_mode = changes.get("downsample_mode", "16x")
        image_processor = MiniCPMV4_6ImageProcessorPil(**{**SETTINGS, **changes})
        check_settings(family, replace(original.processor, image_processor=image_processor), tmp_path)

    def test_the_picture_graph_of_released_models(self, original: LoadedModel, tmp_path: Path) -> None:
        """Grids of logarithms that are equally near, too, where a picture is three times as wide as high."""
        processor = replace(original.processor, image_processor=MiniCPMV4_6ImageProcessorPil())
        sizes = (*LARGE_SIZES, (450, 1350), (448, 897))
        assert check_settings(load_family(original.source), processor, tmp_path, sizes) == 0

    def test_a_graph_refuses_what_grows_too_large(self, original: LoadedModel, tmp_path: Path) -> None:
        processor = replace(
            original.processor, image_processor=MiniCPMV4_6ImageProcessorPil(**{**SETTINGS, "scale_resolution": 4096})
        )
        assert check_settings(load_family(original.source), processor, tmp_path, [(60000, 1)]) == 1

    def test_numbers_of_pictures_that_are_no_digits_have_no_graph(self, original: LoadedModel) -> None:
        tokenizer = copy.deepcopy(original.processor.tokenizer)
        tokenizer.add_tokens(["12"])
        assert load_family(original.source).picture_graph(replace(original.processor, tokenizer=tokenizer)) is None

    def test_a_picture_that_grows_too_large_is_refused(self, original: LoadedModel) -> None:
        narrow = Sample(np.zeros((3_000_000, 1, 3), np.uint8), "what?", origin="line 3")
        with pytest.raises(InputError, match=r"line 3: .* it has \d+ pixels, and up to 33554432 fit .*Crop or scale"):
            original.family.encode(original.processor, [narrow])

    def test_a_long_video_goes_ten_images_at_a_time(self, original: LoadedModel) -> None:
        frames = [noise(60 + number, 56).crop((0, 0, 56, 56)) for number in range(12)]
        sample = Sample((Video(frames, 1.0), SQUARE, Video(frames[:2], 1.0)), "what moves?", marks=(0, 4, 11))
        encoded = original.family.encode(original.processor, [sample])
        feeds = original.family.visual_feeds(encoded)
        assert [len(feed["pixel_values"]) for feed in feeds] == [10, 2, 1, 2]
        check_limits(EngineLimits(tiles=15), encoded, 1)
        with pytest.raises(InputError, match="15 tiles: it was built for 14"):
            check_limits(EngineLimits(tiles=14), encoded, 1)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"do_resize": False}, "settings do not scale frames"),
            ({"do_sample_frames": False, "stack_frames": 3}, "put frames together that were not chosen"),
            ({"resample": 4}, "scale frames with filter 4"),
            ({"max_slice_nums": 1}, "Frames of 2 x 400000 have .* pixels where they are scaled"),
        ],
        ids=str,
    )
    def test_videos_that_are_refused(
        self, folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
    ) -> None:
        copied = copy_files(folder, tmp_path / "model")
        table = {**SETTINGS, "scale_resolution": 4096, **changes}
        (copied / "video_preprocessor_config.json").write_text(json.dumps(table), encoding="utf-8")
        family = load_family(str(copied))
        video = Video(np.zeros((2, 400_000, 2, 3), np.uint8), 1.0)
        with pytest.raises(InputError, match=complaint):
            family.encode(family.load_processor(str(copied)), [Sample(video, "what?")])

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"patch_size": 16}, "video_preprocessor_config.json of .* patch_size is 16"),
            ({"downsample_mode": "4x"}, "video_preprocessor_config.json of .* downsample_mode is 4x"),
            ({"max_slice_nums": 10**6}, "Key 'max_slice_nums' of"),
            ({"stack_frames": 10**6}, "Key 'stack_frames' of"),
        ],
        ids=str,
    )
    def test_settings_of_another_models_videos(
        self, folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
    ) -> None:
        copied = copy_files(folder, tmp_path / "model")
        table = {**SETTINGS, **changes}
        (copied / "video_preprocessor_config.json").write_text(json.dumps(table), encoding="utf-8")
        with pytest.raises(ModelError, match=complaint):
            load_family(str(copied)).load_processor(str(copied))

    def test_a_tokenizer_without_a_token_for_videos(self, folder: Path, tmp_path: Path) -> None:
        copied = copy_files(folder, tmp_path / "model")
        edit(copied / "config.json", lambda table: merge(table, {"video_token_id": 3}))
        family = load_family(str(copied))
        with pytest.raises(InputError, match="This model reads no videos here"):
            family.encode(family.load_processor(str(copied)), [Sample(Video([SQUARE] * 2, 2.0), "what moves?")])

    def test_engines_for_gpus_answer_alike(self, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        check_device_engines(made, tmp_path, monkeypatch)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"downsample_mode": "8x"}, "downsample_mode '8x' is none of"),
            ({"merger_times": 2}, "merger_times is 2, and tokens are counted for 1"),
            ({"merge_kernel_size": [1, 4]}, r"merge_kernel_size is \[1, 4\], and patches are joined two by two"),
            ({"insert_layer_id": 2}, "insert_layer_id 2 is none of the vision encoder's 2 layers"),
            ({"image_token_id": None}, "image_token_id None is outside the vocabulary"),
            ({"vision_config": {"image_size": 10}}, "patches of 14 pixels do not fit an image_size of 10"),
            ({"vision_config": {"window_kernel_size": [4, 4]}}, r"window_kernel_size is \[4, 4\]"),
        ],
        ids=str,
    )
    def test_configurations_that_no_model_has(
        self, folder: Path, tmp_path: Path, changes: dict[str, Any], complaint: str
    ) -> None:
        copied = copy_files(folder, tmp_path / "model")
        edit(copied / "config.json", lambda table: merge(table, changes))
        with pytest.raises(ModelError, match=complaint):
            load_family(str(copied))

    @pytest.mark.parametrize(
        ("file", "changes", "complaint"),
        [
            (
                "preprocessor_config.json",
                {"patch_size": 16},
                "patch_size is 16; the vision encoder of config.json has 14",
            ),
            ("preprocessor_config.json", {"downsample_mode": "4x"}, "downsample_mode is 4x; the vision encoder"),
            ("preprocessor_config.json", {"do_resize": False}, "Key 'do_resize' of"),
            ("preprocessor_config.json", {"max_slice_nums": 10**6}, "Key 'max_slice_nums' of"),
            (
                "tokenizer_config.json",
                {"slice_end_token": None, "model_specific_special_tokens": {}},
                "has no slice_end_token, which stands at",
            ),
        ],
        ids=str,
    )
    def test_files_of_another_model(
        self, folder: Path, tmp_path: Path, file: str, changes: dict[str, Any], complaint: str
    ) -> None:
        copied = copy_files(folder, tmp_path / "model")
        edit(copied / file, lambda table: merge(table, changes))
        with pytest.raises(ModelError, match=complaint):
            load_family(str(copied)).load_processor(str(copied))


@pytest.mark.parametrize(("most", "resolution"), [(9, 448), (6, 112), (64, 100)])
def test_slices_are_as_transformers_cuts_them(most: int, resolution: int) -> None:
    """Pictures of any size, and of shapes that are equally near to two grids."""
    processor = MiniCPMV4_6ImageProcessorPil(max_slice_nums=most, scale_resolution=resolution)
    write = Nodes()
    sides = [ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([])) for name in "hw"]
    cut, grid = slice_grid(write, sides, processor)
    found = output(
        write("Concat", *(write.spread(value, 0) for value in (write.cast(cut, ir.DataType.INT64), *grid)), axis=0),
        ir.DataType.INT64,
        3,
    )
    graph = ir.Graph(sides, [found], nodes=write.nodes, opset_imports={"": OPSET}, name="grid")
    run = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()).run
    sizes = np.random.default_rng(0).integers(1, 4000, (300, 2)).tolist()
    sizes += [(a * scale, b * scale) for a in range(1, 13) for b in range(1, 13) for scale in (100, 137, 333)]
    for height, width in sizes:
        (computed,) = run(None, {"h": np.array(height), "w": np.array(width)})
        wanted = processor.get_sliced_grid((height, width), most, resolution)
        assert computed.tolist() == [int(wanted is not None), *(wanted or (1, 1))], (height, width)


def counted_positions(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions that transformers' `generate` gives the tokens of a padded batch, which `forward` does not."""
    return (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)


def merge(table: dict[str, Any], changes: dict[str, Any]) -> None:
    """Change a table and the tables in it."""
    for key, value in changes.items():
        if isinstance(value, dict) and value:
            merge(table[key], value)
        else:
            table[key] = value


def test_four_times_as_many_tokens(tmp_path: Path) -> None:
    """Without what joins patches in the vision encoder: inputs and features of transformers."""
    loaded = load_model(str(write(tmp_path / "model", downsample_mode="4x")), torch.float32)
    family = loaded.family
    assert sum(block.group == "visual" for block in family.blocks(loaded.model)) == 2
    inputs = check_inputs(family, loaded.processor, CASES["several turns"])
    own = plain(loaded)
    with exportable(loaded.model) as linears:
        graph = trace_graph(family.graphs(loaded.model)[0])
    attach_plain_linears(graph, linears)
    attach_attention(graph)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    feeds = family.visual_feeds(family.encode(loaded.processor, CASES["several turns"]))
    hidden = np.concatenate([np.asarray(session.run(None, feed)[0]) for feed in feeds])
    with torch.no_grad():
        wanted = torch.cat(own.get_image_features(inputs["pixel_values"], inputs["target_sizes"]).pooler_output)
        found = own.model.merger.mlp[0](torch.from_numpy(hidden).flatten(1))
    assert len(wanted) == (inputs["input_ids"] == family.config.image_token_id).sum()
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
