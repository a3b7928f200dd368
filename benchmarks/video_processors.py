"""Are our frames, patches and times those of transformers' own video processors? They need torchvision.

    pip install torchvision
    python benchmarks/video_processors.py --videos 60

Videos of random shapes, lengths and rates go through transformers' classes and through ours.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from importlib import import_module
from typing import Any

import numpy as np

from qe_edge.models.image_processors import pil_image_processor
from qe_edge.models.llava_onevision_videos import FrameVideos
from qe_edge.models.minicpmv4_6_videos import SliceVideos, SliceVideoValues
from qe_edge.models.qwen_vl_videos import Qwen3Videos, QwenVideos
from qe_edge.models.smolvlm_videos import SmolVideos, SmolVideoValues
from qe_edge.models.tile_videos import TileVideos
from qe_edge.models.video_plans import plan_videos, prepare_video
from qe_edge.models.video_values import TileVideoValues, VideoValues
from qe_edge.models.videos import Video

PIXELS = {"size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 640 * 480}}
TILE, SMOL = {"size": {"height": 448, "width": 448}}, {"max_image_size": {"longest_edge": 512}}
SLICES = {"scale_resolution": 224, "stack_frames": 3}
Ours = QwenVideos | TileVideos | SmolVideos | SliceVideos


def processors() -> dict[str, tuple[dict[str, Any], Ours]]:
    """By transformers' name of a family: what differs from the defaults of its class, and our counterpart."""
    return {
        "qwen2_vl": (PIXELS, QwenVideos(VideoValues.model_validate({**QwenVideos.defaults, **PIXELS}))),
        "qwen3_vl": (PIXELS, Qwen3Videos(VideoValues.model_validate({**Qwen3Videos.defaults, **PIXELS}))),
        "internvl": (TILE, TileVideos(TileVideoValues.model_validate({**TileVideos.defaults, **TILE}), 1)),
        "llava_onevision": (TILE, FrameVideos(TileVideoValues.model_validate({**FrameVideos.defaults, **TILE}), 1)),
        "minicpmv4_6": (
            SLICES,
            SliceVideos(
                SliceVideoValues.model_validate({**SliceVideos.defaults, **SLICES}),
                pil_image_processor("minicpmv4_6")(),
            ),
        ),
        "smolvlm": (SMOL, SmolVideos(SmolVideoValues.model_validate({**SmolVideos.defaults, **SMOL}), 1)),
    }


def compare(model_type: str, videos: int) -> dict[str, object]:
    """How many videos become the same arrays, and the seconds of both."""
    module = import_module(f"transformers.models.{model_type}.video_processing_{model_type}")
    changes, ours = processors()[model_type]
    real = getattr(module, module.__all__[0])(**changes)
    random = np.random.default_rng(0)
    equal, seconds = 0, np.zeros(2)
    for _ in range(videos):
        count, height, width = (int(number) for number in random.integers((2, 30, 30), (24, 400, 400)))
        fps = float(random.uniform(0.5, 30))
        frames = random.integers(0, 256, (count, height, width, 3), np.uint8)
        known = [{"total_num_frames": count, "fps": fps, "frames_indices": list(range(count)), "duration": count / fps}]
        marks = [time.perf_counter()]
        wanted = real(videos=[frames], video_metadata=known, return_tensors="np", return_metadata=True)
        marks.append(time.perf_counter())
        [plan] = plan_videos(ours, [Video(frames, fps)])
        found = prepare_video(ours, plan)
        marks.append(time.perf_counter())
        seconds += np.diff(marks)
        pixels = found["pixel_values_videos" if "pixel_values_videos" in found else "pixel_values"]
        expected = np.asarray(wanted.get("pixel_values_videos", wanted.get("pixel_values")))
        if "target_sizes_videos" in found:  # patches in a row, and frames that stand together
            expected = expected.reshape(1, 3, 14, -1, 14).transpose(0, 3, 1, 2, 4).reshape(1, len(pixels), -1)
            same = np.array_equal(found["target_sizes_videos"], wanted["target_sizes_videos"])
        else:
            same = plan.numbers == list(wanted["video_metadata"][0].frames_indices)
        equal += same and np.array_equal(pixels, expected if expected.ndim == 2 else expected[0])
    row = {"family": model_type, "videos": videos, "equal": int(equal)}
    return {**row, "seconds_transformers": round(seconds[0], 2), "seconds_ours": round(seconds[1], 2)}


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=60, help="videos of each family")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [compare(model_type, asked.videos) for model_type in processors()]
    print("| family | videos | equal to the last bit | seconds of transformers | ours |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        print("|", " | ".join(str(value) for value in row.values()), "|")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
