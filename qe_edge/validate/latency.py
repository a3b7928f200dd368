"""Speed, memory and energy, measured one runtime at a time in a process of its own, so that they are its alone."""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.models.videos import Video, open_video
from qe_edge.runtime.backends import check_runnable
from qe_edge.runtime.engine_info import EngineInfo, read_engine_info
from qe_edge.system import errors
from qe_edge.system.child_process import isolated_module, safe_environment
from qe_edge.system.errors import InputError, ResourceError
from qe_edge.system.power import SYSTEM
from qe_edge.system.progress import Progress, Silent, track
from qe_edge.validate.schema import Latency

ACCURACY_LEVELS = (0, 4)
CHILD = "qe_edge.validate.latency_child"
REFUSED = 65  # exit code of a child that cannot measure; its last line says why


@dataclass(frozen=True)
class VideoFiles:
    """A video as a child process opens it: the path of its file or folder, or of every frame."""

    source: str | tuple[str, ...]
    fps: float | None
    every_frame: bool


@dataclass(frozen=True)
class Measurement:
    """The task of a child process: one question in one runtime.

    Attributes:
        runtime: "onnxruntime", "onnxruntime_cuda", "tensorrt", "tensorrt_rtx" or "pytorch".
        setting: Distinguishes measurements of one runtime, for example "accuracy level 4".
        model: Engine folder, or the original model's folder or hub id.
        accuracy_level: Accuracy level of ONNX Runtime.
        threads: Threads to use.
        question: The question.
        pictures: Paths of its pictures.
        videos: Its videos, which follow the pictures.
        repeats: Most repeats.
        seconds: Stop repeating after this time, but not before three repeats.
        new_tokens: Tokens decoded after the first in every repeat.
        plugin_library: Library of engines that need the plugin, None for the one that is found.
        system: The folder that Linux mounts as `/sys`, which has the power rails.
    """

    runtime: str
    setting: str
    model: str
    accuracy_level: int
    threads: int
    question: str
    pictures: tuple[str, ...]
    videos: tuple[VideoFiles, ...] = ()
    repeats: int = 20
    seconds: float = 5.0
    new_tokens: int = 8
    plugin_library: str | None = None
    system: str = str(SYSTEM)


def measure_latency(
    engines: Path,
    sample: Sample,
    *,
    original: str | None = None,
    plugin_library: Path | None = None,
    threads: int | None = None,
    new_tokens: int = 8,
    seconds: float = 5.0,
    progress: Progress | None = None,
) -> list[Latency]:
    """Time one question on an engine, in ONNX Runtime at every accuracy level, and on the original model in PyTorch.

    Args:
        engines: Folder of the engine.
        sample: The question, asked again and again.
        original: Original model for comparison; None leaves it out.
        plugin_library: For engines with the plugin: its library, None for the one that is found.
        threads: Threads on the CPU, None for as many as it has cores.
        new_tokens: Tokens decoded after the first in every repeat.
        seconds: Time after which each runtime stops repeating, but not before three repeats.
        progress: Where to report progress.

    Raises:
        TargetError: If this machine cannot run the engine.
        InputError: If prompt and new tokens do not fit into the context, or an engine that uses no threads gets some.
        ResourceError: If a measuring process dies, most often for want of memory.

    Example:
        >>> question = Sample("picture.png", "what color is the shape?")  # doctest: +SKIP
        >>> for row in measure_latency(Path("out/demo/engines/cpu"), question, original="demo"):  # doctest: +SKIP
        ...     print(row.runtime, row.setting, row.steps["first_token"].median)
    """
    check_runnable(engines, plugin_library)
    info = read_engine_info(engines)
    if threads is not None and original is None and info is not None and info.backend != "onnxruntime":
        raise InputError(
            f"'{engines}' holds engines for a GPU, which use no threads of the CPU.", "Leave --threads out."
        )
    threads = threads or psutil.cpu_count(logical=False) or 1
    with tempfile.TemporaryDirectory() as folder:
        pictures = tuple(str(Path(folder) / f"{number}.png") for number in range(len(sample.pictures)))
        for source, path in zip(sample.pictures, pictures, strict=True):
            open_image(source).save(path)
        videos = tuple(
            _video_files(video, Path(folder, f"video{number}")) for number, video in enumerate(sample.videos)
        )
        first = Measurement(
            "onnxruntime", "", str(engines), 0, threads, sample.question, pictures, videos,
            seconds=seconds, new_tokens=new_tokens, plugin_library=_text(plugin_library),
        )  # fmt: skip
        wanted = _measurements(first, info, original)
        found = []
        with track(progress or Silent(), "Measuring speed", len(wanted)) as tracked:
            for measurement in wanted:
                found.append(_in_child(measurement))
                tracked.advance(1, measurement.runtime)
    return found


def _measurements(first: Measurement, info: EngineInfo | None, original: str | None) -> list[Measurement]:
    """Return a measurement of every runtime; all ask the question of `first`."""
    if info is None or info.backend == "onnxruntime":
        wanted = [replace(first, accuracy_level=level, setting=f"accuracy level {level}") for level in ACCURACY_LEVELS]
    else:
        setting = f"{info.version}, {'with' if info.plugin else 'without'} the plugin"
        wanted = [replace(first, runtime=info.backend, setting=setting)]
    if original is not None:
        wanted.append(replace(first, runtime="pytorch", setting="float32", model=original))
    return wanted


def _video_files(video: Video, folder: Path) -> VideoFiles:
    """A video as files; frames that are in memory are written to `folder`."""
    if isinstance(video.source, Path):
        return VideoFiles(str(video.source.resolve()), video.fps, video.every_frame)
    folder.mkdir()
    frames = open_video(video)
    paths = tuple(str(folder / f"{number:06}.png") for number in range(frames.count))
    for number, path in enumerate(paths):
        frames.read([number])[0].save(path)
    return VideoFiles(paths, frames.fps, video.every_frame)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _in_child(measurement: Measurement) -> Latency:
    request = TypeAdapter(dict[str, object]).dump_json(asdict(measurement))
    done = subprocess.run(
        isolated_module(CHILD), input=request, capture_output=True, check=False, env=safe_environment()
    )
    if done.returncode == REFUSED:
        said = json.loads(done.stdout.splitlines()[-1])
        raise getattr(errors, said["kind"], ResourceError)(said["problem"], said["remedy"])
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise ResourceError(
            f"The process that measures the speed of {measurement.runtime} ended with code {done.returncode}: {last}",
            "Free some memory and repeat the command.",
        )
    return Latency.model_validate_json(done.stdout.splitlines()[-1])
