"""Videos from users: their sources, the frames that are seen, and the same numbers as transformers'."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from qe_edge.calibration.sources import hash_samples
from qe_edge.models.family import Sample
from qe_edge.models.films import FILM_ENDINGS
from qe_edge.models.image_processors import pil_image_processor
from qe_edge.models.llava_onevision_videos import FrameVideos
from qe_edge.models.minicpmv4_6_videos import SliceVideos, SliceVideoValues
from qe_edge.models.qwen_vl_videos import Qwen3Videos, QwenVideos
from qe_edge.models.samples import Turn
from qe_edge.models.smolvlm_videos import SmolVideos, SmolVideoValues
from qe_edge.models.tile_videos import TileVideos
from qe_edge.models.torch_resize import scale_frames
from qe_edge.models.video_plans import plan_videos, prepare_video
from qe_edge.models.video_values import TileVideoValues, VideoValues, load_video_values, write_video_settings
from qe_edge.models.videos import Video, content_of, count_video_pixels, open_video
from qe_edge.system.errors import InputError, ModelError, QENotice
from tests.models.conversations import noise
from tests.models.real_processors import torch_alone, video_class

FRAMES = [noise(40, 30 + number).resize((40, 30)) for number in range(4)]
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 200 * 200}},
    {
        "cap_pixels_per_frame": True,
        "max_video_tokens": 4,
        "size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 200 * 200},
    },
    {"num_frames": 4, "fps": None, "do_sample_frames": True, "do_normalize": False},
    {"fps": 1.0, "do_sample_frames": True, "min_frames": 2, "max_frames": 6, "do_rescale": False, "resample": 2},
)
SHAPES = ((2, 64, 64, 2.0), (5, 117, 203, 3.0), (9, 40, 150, None), (31, 20, 50, 10.0))


def real_frames(real: Any, shape: tuple[int, int, int], fps: float) -> tuple[np.ndarray, Any]:  # noqa: ANN401
    """Frames of noise, `shape` of them, height and width, and what a processor of transformers makes of them."""
    count = shape[0]
    frames = np.random.default_rng(count).integers(0, 256, (*shape, 3), np.uint8)
    known = {"total_num_frames": count, "fps": fps, "frames_indices": list(range(count)), "duration": count / fps}
    return frames, real(videos=[frames], video_metadata=[known], return_tensors="np", return_metadata=True)


def pixels(frames: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(frame) for frame in frames])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "lanczos"])
def test_frames_are_scaled_as_torch_does_it(mode: str) -> None:
    random = np.random.default_rng(7)
    for _ in range(12):
        old, new = random.integers(1, 150, (2, 2)).tolist()
        frames = random.integers(0, 256, (2, *old, 3), np.uint8)
        turned = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        expected = interpolate(turned, new, mode=mode, antialias=True).permute(0, 2, 3, 1).numpy()
        number = {"lanczos": 1, "bilinear": 2, "bicubic": 3}[mode]
        assert np.array_equal(scale_frames(frames, *new, number), expected), (old, new)


@pytest.mark.parametrize("change", range(len(CHANGES)))
@pytest.mark.parametrize(("model_type", "kind"), [("qwen2_vl", QwenVideos), ("qwen3_vl", Qwen3Videos)])
def test_patches_are_those_of_transformers(model_type: str, kind: type[QwenVideos], change: int) -> None:
    changes = CHANGES[change]
    if "fps" in changes and changes["fps"] is None:
        given = {key: value for key, value in changes.items() if key != "fps"}
        ours = kind(VideoValues.model_validate({**kind.defaults, **given, "fps": None}))
    else:
        given, ours = changes, kind(VideoValues.model_validate({**kind.defaults, **changes}))
    with torch_alone():
        real = video_class(model_type)(**given)
        if "num_frames" in changes:
            real.fps = None
        for count, height, width, fps in SHAPES:
            if fps is None and model_type == "qwen2_vl" and changes.get("fps"):
                continue  # transformers refuses it
            if "num_frames" in changes and count < changes["num_frames"]:
                continue
            frames = np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)
            known = [{"total_num_frames": count, "fps": fps, "frames_indices": list(range(count))}]
            wanted = real(videos=[frames], video_metadata=known, return_tensors="np", return_metadata=True)
            [plan] = plan_videos(ours, [Video(frames, fps)])
            found = prepare_video(ours, plan)
            assert plan.numbers == list(wanted["video_metadata"][0].frames_indices)
            assert plan.tokens * 4 == len(found["pixel_values_videos"])
            assert np.array_equal(found["video_grid_thw"], wanted["video_grid_thw"])
            assert np.array_equal(found["pixel_values_videos"], wanted["pixel_values_videos"])


TILE = {"size": {"height": 56, "width": 56}, "do_sample_frames": True}
SMOL = {"max_image_size": {"longest_edge": 64}, "do_sample_frames": True}
SAMPLING = {"fps": 1.0, "max_frames": 8, "video_size": {"longest_edge": 96}}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("internvl", {**TILE, "num_frames": 4}),
        ("internvl", {**TILE, "fps": 1.5, "initial_shift": 0}),
        ("internvl", {**TILE, "fps": 1.5, "initial_shift": 1.5, "do_sample_frames": False}),
        ("llava_onevision", {**TILE, "num_frames": 4, "do_center_crop": None}),
        ("llava_onevision", {**TILE, "fps": 1.7, "resample": 2}),
        ("llava_onevision", {**TILE, "do_normalize": False, "image_mean": [0.5, 0.5, 0.5]}),
        ("smolvlm", {**SMOL, "num_frames": 3, "fps": 0.5, "size": {"longest_edge": 192}}),
        ("smolvlm", {**SMOL, "video_sampling": SAMPLING, "do_sample_frames": False}),
        ("smolvlm", {**SMOL, "video_sampling": SAMPLING, "size": {"longest_edge": 128}, "do_normalize": False}),
    ],
)
def test_frames_as_tiles_are_those_of_transformers(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(changes))
    with torch_alone():
        real = video_class(model_type).from_pretrained(tmp_path)
        ours: TileVideos | SmolVideos
        if model_type != "smolvlm":
            kind = TileVideos if model_type == "internvl" else FrameVideos
            tiles = load_video_values(str(tmp_path), TileVideoValues, kind.defaults)
            assert tiles is not None
            ours = kind(tiles, tokens_of_frame=6)
        else:
            smol = load_video_values(str(tmp_path), SmolVideoValues, SmolVideos.defaults)
            assert smol is not None
            ours = SmolVideos(smol, tokens_of_frame=6)
        for count, height, width, fps in ((5, 117, 203, 2.0), (9, 150, 40, 3.0), (60, 20, 51, 4.0)):
            frames, wanted = real_frames(real, (count, height, width), fps)
            [plan] = plan_videos(ours, [Video(frames, fps)])
            found = prepare_video(ours, plan)
            assert plan.numbers == list(wanted["video_metadata"][0].frames_indices)
            assert plan.tokens == 6 * len(plan.numbers) + (model_type == "llava_onevision")
            pixels = found.get("pixel_values_videos", found.get("pixel_values"))
            name = "pixel_values" if model_type == "smolvlm" else "pixel_values_videos"
            assert np.array_equal(pixels, np.asarray(wanted[name])[0])
            assert np.allclose(found["frame_seconds"], np.array(plan.numbers) / fps)


SLICES: dict[str, Any] = {"scale_resolution": 112, "max_slice_nums": 6}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_frames": 7, "slice_mode": False, "do_normalize": False},
        {"downsample_mode": "4x", "do_sample_frames": False, "max_slice_nums": 9, "resample": 2},
        *({"stack_frames": shares} for shares in (2, 3, 4, 5, 6)),
        {"stack_frames": 3, "max_num_frames": 7, "scale_resolution": 56},
    ],
    ids=str,
)
def test_frames_in_slices_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({**SLICES, **changes}))
    values = load_video_values(str(tmp_path), SliceVideoValues, SliceVideos.defaults)
    assert values is not None
    ours = SliceVideos(values, pil_image_processor("minicpmv4_6")())
    with torch_alone():
        real = video_class("minicpmv4_6").from_pretrained(tmp_path)
        shapes = (1, 64, 64, 24.0), (5, 117, 203, 2.0), (17, 150, 40, 6.4), (64, 20, 51, 5.0)
        even = 9, 30, 22, 3.0  # of which two are as far from a square beside each other as below
        for count, height, width, fps in (*shapes, even):
            frames, wanted = real_frames(real, (count, height, width), fps)
            [plan] = plan_videos(ours, [Video(frames, fps)])
            found = prepare_video(ours, plan)
            seen = sorted(wanted["video_metadata"][0].frames_indices)
            assert sorted(plan.numbers) == seen or "stack_frames" in changes
            joined = 4 if changes.get("downsample_mode") == "4x" else 16
            assert plan.tokens == wanted["target_sizes_videos"].prod(1).sum() // joined
            patches = np.asarray(wanted["pixel_values_videos"])[0].reshape(3, 14, -1, 14).transpose(2, 0, 1, 3)
            assert np.array_equal(found["pixel_values_videos"], patches.reshape(len(patches), -1))
            assert np.array_equal(found["target_sizes_videos"], wanted["target_sizes_videos"])
            assert np.array_equal(found["unit_grids"], wanted["grids_videos"])
            assert found["units"].tolist() == list(wanted["num_frames_per_video"])


def test_every_frame_stands_alone() -> None:
    values = SliceVideoValues.model_validate({**SliceVideos.defaults, "stack_frames": 3})
    ours = SliceVideos(values, pil_image_processor("minicpmv4_6")())
    film = Video([FRAMES[0]] * 12, fps=6)
    [stacked], [all_of_them] = plan_videos(ours, [film]), plan_videos(ours, [replace(film, every_frame=True)])
    assert (stacked.numbers, stacked.together) == ([0, 2, 4, 6, 8, 10], [1, 2, 1, 2])
    assert (all_of_them.numbers, all_of_them.together) == (list(range(12)), [1] * 12)


def saved(folder: Path, name: str, **options: Any) -> Path:  # noqa: ANN401 - Pillow's own
    FRAMES[0].save(folder / name, save_all=True, append_images=FRAMES[1:], **options)
    return folder / name


def test_sources_of_a_video(tmp_path: Path) -> None:
    """The same frames from memory, from a folder and from animated pictures, whose durations say the rate."""
    for number, frame in enumerate(FRAMES):
        frame.save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    expected = pixels(FRAMES)
    webp = saved(tmp_path, "film.webp", duration=250, lossless=True)
    gif = saved(tmp_path, "film.gif", duration=[100, 300, 100, 300])
    for source, fps in (
        (FRAMES, None),
        (expected, None),
        ([tmp_path / f"{number}.png" for number in range(4)], None),
        (webp, 4.0),
        (webp.read_bytes(), 4.0),
    ):
        frames = open_video(Video(source, None))
        assert (frames.count, frames.size, frames.fps) == (4, (40, 30), fps)
        assert np.array_equal(pixels(frames.read([0, 1, 2, 3])), expected)
        assert np.array_equal(pixels(frames.read([1, 1, 3])), expected[[1, 1, 3]])
        assert count_video_pixels(Video(source)) == 4 * 40 * 30
    assert open_video(Video(gif)).fps == 5.0
    assert open_video(Video(gif, 2)).fps == 2.0
    (tmp_path / "film.webp").unlink()
    (tmp_path / "film.gif").unlink()
    assert np.array_equal(pixels(open_video(Video(tmp_path)).read([0, 3])), expected[[0, 3]])


def test_a_film(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="an optional extra")
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 40, 30, "yuv420p"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    frames = open_video(Video(tmp_path / "film.mp4"))
    assert (frames.count, frames.size, frames.fps) == (4, (40, 30), 5.0)
    first, last = frames.read([0, 3])
    assert abs(pixels([first, last]).astype(float) - pixels([FRAMES[0], FRAMES[3]])).mean() < 64  # it loses some
    assert np.array_equal(pixels(frames.read([3])), pixels([last]))
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    with pytest.raises(InputError, match="cannot be read"):
        open_video(Video(tmp_path / "broken.mp4"))


def test_a_film_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.models.films.find_spec", lambda _: None)
    for ending in FILM_ENDINGS:
        (tmp_path / f"film{ending}").write_bytes(b"")
        with pytest.raises(InputError, match="needs PyAV") as caught:
            open_video(Video(tmp_path / f"film{ending}"))
        assert "qe-edge[video]" in caught.value.remedy


@pytest.mark.parametrize(
    ("source", "fps", "words"),
    [
        ([], None, "no frames"),
        (np.zeros((4, 4, 3), np.uint8), None, "array of uint8"),
        ([3], None, "A frame of a video is a int"),
        (7, None, "A video is a int"),
        (FRAMES, 0, "no rate"),
        (FRAMES, float("nan"), "no rate"),
        (FRAMES, True, "no rate"),
        (FRAMES, "2", "no rate"),
        ("missing.gif", None, "There is no video 'missing.gif'"),
        ("empty", None, "holds no pictures"),
        ("text.gif", None, "no video of a known format"),
        ("half.gif", None, "damaged"),
        (b"text", None, "no video of a known format"),
        ([FRAMES[0], noise(20, 20)], None, "40x30 and of 20x20"),
        ([b"text", FRAMES[0]], None, "not a picture"),
    ],
)
def test_what_is_no_video(
    source: Any,  # noqa: ANN401 - what users give
    fps: Any,  # noqa: ANN401 - as above
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.gif").write_text("no picture")
    Path("half.gif").write_bytes(saved(tmp_path, "whole.gif").read_bytes()[:900])
    with pytest.raises(InputError) as caught:
        list(content_of(Video(source, fps))) if words != "damaged" else open_video(Video(source, fps)).read([0, 3])
    assert words in caught.value.problem
    assert caught.value.remedy


def test_too_many_tokens_are_said_before_a_frame_is_read() -> None:
    processor = QwenVideos(VideoValues.model_validate(QwenVideos.defaults), max_tokens=400)
    unread = Video([FRAMES[0], b"no picture", b"no picture"], 2)
    with pytest.raises(InputError, match="becomes 280 tokens, all videos 420; up to 400 fit") as caught:
        plan_videos(processor, [unread, Video(FRAMES[:2], 2)])
    assert "--max-context" in caught.value.remedy


def test_rates_and_every_frame() -> None:
    processor = Qwen3Videos(VideoValues.model_validate(Qwen3Videos.defaults))
    film = Video([FRAMES[0]] * 20, fps=10)
    [sampled], [all_of_them] = plan_videos(processor, [film]), plan_videos(processor, [replace(film, every_frame=True)])
    assert sampled.numbers == [0, 6, 13, 19]
    assert all_of_them.numbers == list(range(20))
    with pytest.warns(QENotice, match="24 are assumed"):
        plan_videos(processor, [Video(FRAMES)])


def test_samples_and_their_hash() -> None:
    film = Video(FRAMES, 2)
    sample = Sample((film, FRAMES[0]), "is it?", earlier=(Turn("user", "what?", (0,)), Turn("assistant", "a circle")))
    assert (sample.videos, sample.pictures) == ((film,), (FRAMES[0],))
    assert [turn.videos for turn in sample.conversation] == [(0,), (), ()]
    assert Sample(sample.media, "is it?", earlier=sample.earlier) == sample
    others = [Video(FRAMES[:3], 2), Video(FRAMES, 3), replace(film, every_frame=True)]
    hashes = {hash_samples([Sample(one, "is it?")]) for one in (film, *others, FRAMES[0])}
    assert len(hashes) == 5
    assert list(content_of(film)) == list(content_of(Video(pixels(FRAMES))))


def test_settings_in_files(tmp_path: Path) -> None:
    """From the files that transformers reads, in its order."""
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 3136, "max_pixels": 50176}')
    old = load_video_values(str(tmp_path), VideoValues, QwenVideos.defaults, pixel_keys=True)
    assert old is not None
    assert (old.size.shortest_edge, old.size.longest_edge) == (3136, 50176)
    write_video_settings(QwenVideos(old), tmp_path)
    assert not (tmp_path / "video_preprocessor_config.json").exists()  # the older file says it all
    write_video_settings(QwenVideos(old.model_copy(update={"do_sample_frames": True, "fps": 1.0})), tmp_path)
    found = load_video_values(str(tmp_path), VideoValues, QwenVideos.defaults, pixel_keys=True)
    assert found is not None
    assert (found.fps, found.size) == (1.0, old.size)
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"fps": 3, "num_frames": 4}}')
    with pytest.raises(ModelError, match="fps and num_frames exclude each other"):
        load_video_values(str(tmp_path), VideoValues, QwenVideos.defaults, pixel_keys=True)
    (tmp_path / "processor_config.json").write_text('{"video_processor": {"max_frames": 100000}}')
    with pytest.raises(ModelError, match="max_frames"):
        load_video_values(str(tmp_path), VideoValues, QwenVideos.defaults, pixel_keys=True)


def test_a_gif_is_one_picture_where_a_picture_is_asked_for() -> None:
    data = io.BytesIO()
    FRAMES[0].save(data, format="GIF", save_all=True, append_images=FRAMES[1:])
    assert Sample(data.getvalue(), "?").videos == ()
