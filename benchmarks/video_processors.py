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

import numpy as np

from qe_edge.models.qwen_vl_videos import Qwen3Videos, QwenVideos
from qe_edge.models.video_plans import plan_videos, prepare_video
from qe_edge.models.video_values import VideoValues
from qe_edge.models.videos import Video

PROCESSORS = {"qwen2_vl": QwenVideos, "qwen3_vl": Qwen3Videos}
SIZE = {"shortest_edge": 32 * 32 * 4, "longest_edge": 640 * 480}


def compare(model_type: str, videos: int) -> dict[str, object]:
    """How many videos become the same arrays, and the seconds of both."""
    module = import_module(f"transformers.models.{model_type}.video_processing_{model_type}")
    real = getattr(module, module.__all__[0])(size=SIZE)
    kind = PROCESSORS[model_type]
    ours = kind(VideoValues.model_validate({**kind.defaults, "size": SIZE}))
    random = np.random.default_rng(0)
    equal, seconds = 0, np.zeros(2)
    for _ in range(videos):
        count, height, width = (int(number) for number in random.integers((2, 30, 30), (24, 400, 400)))
        fps = float(random.uniform(0.5, 30))
        frames = random.integers(0, 256, (count, height, width, 3), np.uint8)
        known = [{"total_num_frames": count, "fps": fps, "frames_indices": list(range(count))}]
        marks = [time.perf_counter()]
        wanted = real(videos=[frames], video_metadata=known, return_tensors="np", return_metadata=True)
        marks.append(time.perf_counter())
        [plan] = plan_videos(ours, [Video(frames, fps)])
        found = prepare_video(ours, plan)
        marks.append(time.perf_counter())
        seconds += np.diff(marks)
        names = ("pixel_values_videos", "video_grid_thw")
        same = all(np.array_equal(found[name], wanted[name]) for name in names)
        equal += same and plan.numbers == list(wanted["video_metadata"][0].frames_indices)
    row = {"family": model_type, "videos": videos, "equal": int(equal)}
    return {**row, "seconds_transformers": round(seconds[0], 2), "seconds_ours": round(seconds[1], 2)}


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=60, help="videos of each family")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [compare(model_type, asked.videos) for model_type in PROCESSORS]
    print("| family | videos | equal to the last bit | seconds of transformers | ours |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        print("|", " | ".join(str(value) for value in row.values()), "|")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
