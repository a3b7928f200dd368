"""`preprocess.onnx` against the image processors that it stands for, with the settings of released models.

LFM2-VL and Phi-4-multimodal have an image processor of ours, which tests compare with transformers' own.

    python benchmarks/picture_graphs.py

For every family: how many pictures of noise come out the same to the last bit, the time for 1920 x 1080 pixels as a
ratio to transformers' image processor in the same process on one thread (medians), and the memory that a picture of
8192 x 8192 takes besides itself, in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZES = ((1, 1), (1, 199), (97, 57), (448, 448), (500, 333), (720, 1280), (768, 1024), (1080, 1920), (1500, 1500),
         (2048, 512), (97, 4000), (4000, 97), (3024, 4032), (4032, 3024))  # fmt: skip
LARGEST, TIMED, REPEATS = (8192, 8192), (1080, 1920), 5
IMAGE_TOKEN, MARK, TOKENS = 0, 1, 64  # of families that name their tiles; ids do not matter here


@dataclass(frozen=True)
class Family:
    """An image processor, its graph, and the `pixel_values` of every run that it makes of a PIL image."""

    processor: Any
    graph: Any
    wanted: Callable[[Image.Image], list[np.ndarray]]


def main() -> None:
    """Print a table and a line of JSON."""
    found = {}
    print(f"{'family':<18} {'equal':>8} {'time ratio':>11} {'MiB':>6}")
    for name in BUILDERS:
        equal, ratio = in_process(compare, name)
        memory = in_process(peak_memory, name)
        found[name] = {"equal": equal, "pictures": len(SIZES), "ratio": ratio, "mebibytes": memory}
        print(f"{name:<18} {equal:>3} of {len(SIZES):<2} {ratio:>10.2f} {memory:>6.0f}")
    print(json.dumps(found))


def qwen2_vl() -> Family:
    """Qwen2-VL 2B: up to 12.8 million pixels."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from qe_edge.models.qwen_vl_pictures import picture_graph

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})
    graph = picture_graph(processor, IMAGE_TOKEN, lambda *_: {})

    def wanted(image: Image.Image) -> list[np.ndarray]:
        values: np.ndarray = processor(images=[image], return_tensors="np")["pixel_values"]
        return [values.reshape(-1, 4, values.shape[-1])]

    return Family(processor, graph, wanted)


def internvl() -> Family:
    """InternVL 2.5 and 3: up to 12 tiles of 448."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    from qe_edge.models.tile_pictures import best_grid

    processor: Any = GotOcr2ImageProcessorPil(size={"height": 448, "width": 448}, min_patches=1, max_patches=12)
    graph = best_grid(processor, ((), IMAGE_TOKEN, ()), 256, IMAGE_TOKEN)
    return Family(
        processor,
        graph,
        lambda image: [processor(images=[image], return_tensors="np", crop_to_patches=True)["pixel_values"]],
    )


def smolvlm() -> Family:
    """SmolVLM: tiles of 512 of a picture of 2048, Lanczos three times."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    from qe_edge.models.idefics3_pictures import picture_graph

    processor = Idefics3ImageProcessorPil(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512})

    def tile_ids(rows: int, columns: int) -> list[int]:
        return ([MARK] + [IMAGE_TOKEN] * TOKENS) * (rows * columns + 1)

    graph = picture_graph(processor, tile_ids, IMAGE_TOKEN, TOKENS)
    return Family(
        processor, graph, lambda image: [np.asarray(processor(images=[image], return_tensors="np")["pixel_values"][0])]
    )


def gemma3() -> Family:
    """Gemma 3: one square of 896."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    from qe_edge.models.tile_pictures import single_tile

    processor: Any = Gemma3ImageProcessorPil(size={"height": 896, "width": 896})
    graph = single_tile(processor, [IMAGE_TOKEN] * 256, IMAGE_TOKEN)
    return Family(
        processor,
        graph,
        lambda image: [processor(images=[image], return_tensors="np", do_pan_and_scan=False)["pixel_values"]],
    )


def paligemma() -> Family:
    """PaliGemma: one square of 224."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    from qe_edge.models.tile_pictures import single_tile

    processor: Any = SiglipImageProcessorPil(size={"height": 224, "width": 224})
    graph = single_tile(processor, [IMAGE_TOKEN] * 256, IMAGE_TOKEN)
    return Family(processor, graph, lambda image: [processor(images=[image], return_tensors="np")["pixel_values"]])


def lfm2_vl() -> Family:
    """LFM2-VL: up to 10 tiles of 512, and the whole of at most 256 tokens."""
    from transformers import AutoConfig

    from qe_edge.models.lfm2_vl import Lfm2VL
    from qe_edge.models.lfm2_vl_pictures import picture_graph
    from qe_edge.models.lfm2_vl_processor import Lfm2VlImageProcessorPil

    processor = Lfm2VlImageProcessorPil()

    def tile_ids(rows: int, columns: int) -> list[int]:
        return [MARK, IMAGE_TOKEN] * (rows * columns + 1) + [MARK]

    graph = picture_graph(processor, tile_ids, IMAGE_TOKEN, side=16)
    family = Lfm2VL(AutoConfig.for_model("lfm2_vl"))
    return Family(processor, graph, lambda image: runs_of(family, processor(images=[image])))


def minicpmv4_6() -> Family:
    """MiniCPM-V 4.6: up to 9 slices of about 448 x 448, and the whole."""
    from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

    from qe_edge.models.minicpmv4_6_pictures import picture_graph
    from qe_edge.models.minicpmv4_6_slices import Slices, image_feeds
    from qe_edge.models.minicpmv4_6_tokens import SliceTokens

    processor = MiniCPMV4_6ImageProcessorPil()
    tokens = SliceTokens([MARK], [[MARK]] * 3, [[MARK]] * 2, IMAGE_TOKEN, most=9)
    slices, joined = Slices(processor), (4, 4)

    def wanted(image: Image.Image) -> list[np.ndarray]:
        prepared = slices(images=[image])
        features = int(prepared["target_sizes"].prod(1).sum()) // 16
        return [run["pixel_values"] for run in image_feeds(prepared, np.zeros(features, bool), joined)]

    return Family(processor, picture_graph(processor, tokens, steps=len(joined)), wanted)


def phi4_multimodal() -> Family:
    """Phi-4-multimodal: up to 36 crops of 448, and the whole in one."""
    from qe_edge.models.phi4_multimodal_pictures import picture_graph
    from qe_edge.models.phi4_multimodal_processor import SMALLEST, Phi4MultimodalImageProcessorPil

    processor = Phi4MultimodalImageProcessorPil()
    graph = picture_graph(processor, IMAGE_TOKEN, side=16)

    def wanted(image: Image.Image) -> list[np.ndarray]:
        layout = processor.layout(image.height, image.width)
        if min(layout.height, layout.width) < SMALLEST:  # refused
            return []
        return [processor(images=[image])["pixel_values"]]

    return Family(processor, graph, wanted)


def llava_onevision() -> Family:
    """LLaVA-OneVision: up to 36 tiles of 384 of a prompt's only picture, and an overview."""
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    from qe_edge.models.llava_onevision_pictures import picture_graph

    processor: Any = LlavaOnevisionImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    graph = picture_graph(processor, IMAGE_TOKEN, side=27, most=9)
    return Family(
        processor, graph, lambda image: [np.asarray(processor(images=image, return_tensors="np")["pixel_values"][0])]
    )


def runs_of(family: Any, prepared: dict[str, np.ndarray]) -> list[np.ndarray]:  # noqa: ANN401 - one of several
    """`pixel_values` of every run of the visual encoder for a prepared picture."""
    from qe_edge.models.family import Encoded

    empty = np.zeros((1, 0), np.int64)
    encoded = Encoded(empty, empty, empty.astype(bool), empty.astype(bool), prepared)
    return [run["pixel_values"] for run in family.visual_feeds(encoded)]


BUILDERS: dict[str, Callable[[], Family]] = {
    "Qwen2-VL": qwen2_vl,
    "InternVL": internvl,
    "SmolVLM": smolvlm,
    "Gemma 3": gemma3,
    "PaliGemma": paligemma,
    "LLaVA-OneVision": llava_onevision,
    "LFM2-VL": lfm2_vl,
    "MiniCPM-V 4.6": minicpmv4_6,
    "Phi-4-multimodal": phi4_multimodal,
}


def compare(name: str) -> tuple[int, float]:
    """How many pictures are equal, and the graph's time over the image processor's."""
    family = BUILDERS[name]()
    run = opened(family)
    generator = np.random.default_rng(0)
    equal = 0
    for size in SIZES:
        pixels = generator.integers(0, 256, (*size, 3), np.uint8)
        found, wanted = run(pixels), family.wanted(Image.fromarray(pixels))
        equal += len(found) == len(wanted) and all(map(np.array_equal, found, wanted))
    pixels = generator.integers(0, 256, (*TIMED, 3), np.uint8)
    image = Image.fromarray(pixels)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for taken, call in zip(times, (lambda: run(pixels), lambda: family.wanted(image)), strict=True):
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    return equal, statistics.median(times[0]) / statistics.median(times[1])


def peak_memory(name: str) -> float:
    """MiB that the largest picture takes besides itself."""
    run = opened(BUILDERS[name]())
    pixels = np.zeros((*LARGEST, 3), np.uint8)
    pixels[::3] = 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(pixels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def opened(family: Family) -> Callable[[np.ndarray], list[np.ndarray]]:
    """The graph in ONNX Runtime on one thread, as engines open it: uint8 pixels to `pixel_values` of every run."""
    from qe_edge.export.exporter import IR_VERSION
    from qe_edge.export.preprocessing import joined_runs, run_picture_graph, write_picture_graph
    from qe_edge.runtime.folder_prompts import TOKENS as TOKEN_OUTPUTS
    from qe_edge.runtime.folder_prompts import visual_runs
    from qe_edge.runtime.sessions import OrtSession

    with tempfile.TemporaryDirectory() as scratch:
        entry = write_picture_graph(family.graph, Path(scratch), IR_VERSION)
        session = OrtSession(Path(scratch), entry, accuracy_level=0, threads=1, frugal=True)

    def run(pixels: np.ndarray) -> list[np.ndarray]:
        outputs = run_picture_graph(session, entry, pixels)
        refused = not len(outputs[TOKEN_OUTPUTS[0]])
        return [] if refused else [found["pixel_values"] for found in joined_runs(visual_runs(outputs))]

    return run


def in_process(function: Callable[[str], Any], name: str) -> Any:  # noqa: ANN401 - the function's own
    """The result of a function in a process of its own, whose memory nobody else has used."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (name,))


if __name__ == "__main__":
    main()
