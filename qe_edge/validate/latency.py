"""Speed and memory, measured one runtime at a time in a process of its own, so that the peak belongs to it alone."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from qe_edge.errors import ResourceError
from qe_edge.models.family import Sample
from qe_edge.models.images import open_image
from qe_edge.progress import Progress, Silent, track
from qe_edge.validate.schema import Latency

ACCURACY_LEVELS = (0, 4)
CHILD = "qe_edge.validate.latency_child"


@dataclass(frozen=True)
class Measurement:
    """What a child process measures.

    Attributes:
        runtime: "onnxruntime" or "pytorch".
        model: Engine folder, or the original model's folder or hub id.
        accuracy_level: Of ONNX Runtime.
        threads: Threads to use.
        question: The question.
        picture: Path of its picture, or None.
        repeats: Most repeats.
        seconds: Stop repeating after this time, but not before three repeats.
        new_tokens: Tokens decoded after the first in every repeat.
    """

    runtime: str
    model: str
    accuracy_level: int
    threads: int
    question: str
    picture: str | None
    repeats: int = 20
    seconds: float = 5.0
    new_tokens: int = 8


def measure_latency(
    engines: Path, sample: Sample, *, original: str | None = None, progress: Progress | None = None
) -> list[Latency]:
    """Time one question on an engine at every accuracy level, and on the original model in PyTorch.

    Args:
        engines: Folder of the engine.
        sample: The question, asked again and again.
        original: Original model for comparison; None leaves it out.
        progress: Where to report progress.

    Raises:
        ResourceError: If a measuring process dies, most often for want of memory.
    """
    threads = psutil.cpu_count(logical=False) or 1
    with tempfile.TemporaryDirectory() as folder:
        picture = None
        if sample.image is not None:
            picture = str(Path(folder) / "picture.png")
            open_image(sample.image).save(picture)
        engine = Measurement("onnxruntime", str(engines), 0, threads, sample.question, picture)
        wanted = [replace(engine, accuracy_level=level) for level in ACCURACY_LEVELS]
        if original is not None:
            wanted.append(replace(engine, runtime="pytorch", model=original))
        found = []
        with track(progress or Silent(), "Measuring speed", len(wanted)) as tracked:
            for measurement in wanted:
                found.append(_in_child(measurement))
                tracked.advance(1, measurement.runtime)
    return found


def _in_child(measurement: Measurement) -> Latency:
    request = TypeAdapter(dict[str, object]).dump_json(asdict(measurement))
    done = subprocess.run([sys.executable, "-m", CHILD], input=request, capture_output=True, check=False)
    if done.returncode:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise ResourceError(
            f"The process that measures the speed of {measurement.runtime} ended with code {done.returncode}: {last}",
            "Free some memory and validate again.",
        )
    return Latency.model_validate_json(done.stdout.splitlines()[-1])
