"""Memory and time of the exported visual encoder on pictures, at the shapes of Qwen2-VL-2B.

    python benchmarks/visual_memory.py

Every run is a process of its own. `picture`: one picture of 1920 x 1080 pixels (10,764 patches), and the memory that
ONNX Runtime takes for it beyond the encoder's weights. `eight`: eight pictures of 448 x 448 pixels, and the time as a
ratio to transformers' own encoder on the same threads. The weights are random float32; time grows with the number of
blocks, memory does not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

VISION = {  # of Qwen2-VL-2B but for its 32 blocks
    "embed_dim": 1280,
    "hidden_size": 1536,
    "num_heads": 16,
    "mlp_ratio": 4,
    "patch_size": 14,
}
TEXT = {"vocab_size": 512, "hidden_size": 1536, "intermediate_size": 64, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 2}
GRIDS = {"picture": [(1, 78, 138)], "eight": [(1, 32, 32)] * 8}
POLL = 0.01  # seconds between two looks at a process's memory


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="vision blocks of the encoder (default 2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_process(export, (folder, arguments.blocks))
        peak = peak_memory(run_onnx, (folder, "picture", arguments.threads, 1))
        idle = peak_memory(run_onnx, (folder, "picture", arguments.threads, 0))
        times = {
            name: in_process(run, (folder, "eight", arguments.threads, arguments.repeats))
            for name, run in (("onnxruntime", run_onnx), ("transformers", run_torch))
        }
    ratio = times["onnxruntime"] / times["transformers"]
    print(f"1920 x 1080: {(peak - idle) / 2**20:.0f} MiB beyond the {idle / 2**20:.0f} MiB of the opened encoder")
    for name, seconds in times.items():
        print(f"eight of 448 x 448, {name}: {seconds:.2f} s")
    print(f"ratio {ratio:.2f}")
    found = {"mebibytes": (peak - idle) / 2**20, "seconds": times, "ratio": ratio, "blocks": arguments.blocks}
    print(json.dumps(found))


def export(folder: Path, blocks: int) -> float:
    """Write the encoder's graph, and its weights for transformers."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from qe_edge.export.exporter import _export_graph
    from qe_edge.export.tracing import exportable
    from qe_edge.models import FAMILIES
    from qe_edge.models.loading import LoadedModel

    torch.manual_seed(0)
    text = {
        **TEXT,
        **HEADS,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    }
    config = Qwen2VLConfig(vision_config={**VISION, "depth": blocks}, text_config=text)
    model = Qwen2VLForConditionalGeneration(config).eval()
    loaded = LoadedModel(model, FAMILIES["qwen2_vl"](config), None, "")
    with exportable(model) as linears:
        spec = next(spec for spec in loaded.family.graphs(model) if spec.name == "visual")
        entry = _export_graph(spec, loaded, linears, folder)
    (folder / "entry.json").write_text(entry.model_dump_json(), encoding="utf-8")
    torch.save(model.model.visual, folder / "visual.pt")
    (folder / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    return 0.0


def pixels_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Random patches `[patches, values]` and the pictures' grids."""
    grids = np.array(GRIDS[name])
    values = 3 * 2 * VISION["patch_size"] ** 2
    return np.random.default_rng(0).standard_normal((int(grids.prod(1).sum()), values), np.float32), grids


def run_onnx(folder: Path, name: str, threads: int, repeats: int) -> float:
    """Median seconds of ONNX Runtime; with no repeat it opens the graph only."""
    from transformers import Qwen2VLConfig

    from qe_edge.models import FAMILIES, Encoded
    from qe_edge.runtime.manifest import GraphEntry
    from qe_edge.runtime.sessions import OrtSession

    family = FAMILIES["qwen2_vl"](Qwen2VLConfig.from_json_file(folder / "config.json"))
    entry = GraphEntry.model_validate_json((folder / "entry.json").read_text(encoding="utf-8"))
    session = OrtSession(folder, entry, 0, threads, frugal=True)
    pixels, grids = pixels_of(name)
    none = np.zeros((1, 0), np.int64)
    encoded = Encoded(none, none, none > 0, none > 0, {"pixel_values": pixels, "image_grid_thw": grids})
    return median_time(lambda: [session.run(feeds) for feeds in family.visual_feeds(encoded)], repeats)


def run_torch(folder: Path, name: str, threads: int, repeats: int) -> float:
    """Median seconds of transformers."""
    import torch

    torch.set_num_threads(threads)
    visual = torch.load(folder / "visual.pt", weights_only=False)  # written by this script
    pixels, grids = (torch.from_numpy(array) for array in pixels_of(name))
    with torch.no_grad():
        return median_time(lambda: visual(pixels, grid_thw=grids), repeats)


def median_time(once: Callable[[], object], repeats: int) -> float:
    """Median seconds of `repeats` runs after one that does not count; 0 without any."""
    times = []
    for _ in range(repeats + 1 if repeats else 0):
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) if times else 0.0


def in_process(function: Callable[..., float], arguments: tuple[Any, ...]) -> float:
    """The result of a function in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(function: Callable[..., float], arguments: tuple[Any, ...]) -> int:
    """The most bytes that a process with this function held."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    watched, peak = psutil.Process(child.pid), 0
    while child.is_alive():
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(POLL)
    child.join()
    return peak


if __name__ == "__main__":
    main()
