"""Run as a module: reads a `Measurement` as JSON from standard input and prints a `Latency` as one line of JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter

from qe_edge.models.family import Sample
from qe_edge.models.videos import Video
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import QEError
from qe_edge.system.lazy import lazy_module
from qe_edge.validate.energy import Gauge
from qe_edge.validate.latency import REFUSED, Measurement
from qe_edge.validate.schema import Latency, Timing

if TYPE_CHECKING:
    import torch
    import transformers

    from qe_edge.models import loading
    from qe_edge.validate import subjects
else:  # an engine's memory is measured without them
    torch = lazy_module("torch")
    transformers = lazy_module("transformers")
    loading = lazy_module("qe_edge.models.loading")
    subjects = lazy_module("qe_edge.validate.subjects")

WARM_UP = 2  # repeats before measuring: memory pools, page cache
LEAST = 3  # repeats even if they take long

Times = dict[str, list[float]]


def measure(request: Measurement) -> Latency:
    """Measure in this process.

    Example:
        >>> pictures = ("picture.png",)  # doctest: +SKIP
        >>> request = Measurement("pytorch", "float32", "demo", 0, 4, "what color is it?", pictures)  # doctest: +SKIP
        >>> measure(request).steps["decode"].median  # doctest: +SKIP
    """
    videos = [Video(one.source, one.fps, one.every_frame) for one in request.videos]
    sample = Sample([*request.pictures, *videos], request.question)
    gauge = Gauge(Path(request.system))
    once, prompt_tokens = (_pytorch if request.runtime == "pytorch" else _engine)(request, sample)
    for _ in range(WARM_UP):
        once({})
    times: Times = {}
    with gauge.running():
        for _ in _repeats(request):
            once(times)
    return Latency(
        runtime=request.runtime,
        setting=request.setting,
        steps={step: _timing(values) for step, values in times.items()},
        prompt_tokens=prompt_tokens,
        threads=request.threads,
        peak_bytes=peak_memory(),
        tokens_per_second=1 / float(np.mean(times["decode"])),
        energy=gauge.energy(len(times["first_token"])),
    )


def peak_memory() -> int:
    """Peak resident memory of this program in bytes.

    `getrusage` would not do: its maximum is inherited from the parent process across fork and exec.

    Example:
        >>> peak_memory() > 10 << 20  # a Python program with numpy takes more than 10 MiB
        True
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _engine(request: Measurement, sample: Sample) -> tuple[Callable[[Times], None], int]:
    engine = VisionLanguageEngine.load(
        request.model,
        accuracy_level=request.accuracy_level,
        threads=request.threads if request.runtime == "onnxruntime" else None,
        plugin_library=Path(request.plugin_library) if request.plugin_library else None,
    )

    def once(times: Times) -> None:
        start = time.perf_counter()
        encoded = engine.encode([sample])
        engine.check_length(encoded, request.new_tokens)
        mark = _note(times, "encode", start)
        features = None
        if encoded.pixels:
            hidden = engine.visual(encoded)
            mark = _note(times, "visual", mark)
            features = engine.merger(hidden)
            mark = _note(times, "merger", mark)
        logits, state = engine.prefill(encoded, features, request.new_tokens)
        mark = _note(times, "prefill", mark)
        _note(times, "first_token", start)
        for _ in range(request.new_tokens):
            logits = engine.decode(state, engine.next_tokens(logits, state))
            mark = _note(times, "decode", mark)

    return once, engine.encode([sample]).input_ids.shape[1]


def _pytorch(request: Measurement, sample: Sample) -> tuple[Callable[[Times], None], int]:
    torch.set_num_threads(request.threads)
    loaded = loading.load_model(request.model, torch.float32)
    subject = subjects.TorchSubject(loaded)
    loaded.model.generation_config = transformers.GenerationConfig()  # nothing ends an answer early
    wanted = transformers.GenerationConfig(do_sample=False, max_new_tokens=1 + request.new_tokens)

    def once(times: Times) -> None:
        clock = _Clock()
        asked = loaded.family.encode(loaded.processor, [sample])
        inputs = loaded.family.torch_inputs(asked)
        with torch.no_grad():
            loaded.model.generate(  # type: ignore[operator] # from a mixin that the base class does not have
                **inputs,
                generation_config=wanted,
                logits_processor=[subject.rules(asked)],
                streamer=clock,
            )
        start, _, first, *rest = clock.times
        times.setdefault("first_token", []).append(first - start)
        times.setdefault("decode", []).extend(np.diff([first, *rest]).tolist())

    encoded = loaded.family.encode(loaded.processor, [sample])
    subject.check_length(encoded, request.new_tokens)
    return once, encoded.input_ids.shape[1]


class _Clock:
    """A transformers streamer that notes when it is made, when it gets the prompt, and when each token comes."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, _tokens: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


def _note(times: Times, step: str, since: float) -> float:
    now = time.perf_counter()
    times.setdefault(step, []).append(now - since)
    return now


def _repeats(request: Measurement) -> Iterator[int]:
    end = time.perf_counter() + request.seconds
    for number in range(request.repeats):
        if number >= LEAST and time.perf_counter() > end:
            return
        yield number


def _timing(seconds: list[float]) -> Timing:
    lower, median, upper, p90, p99 = np.percentile(np.array(seconds) * 1e3, [25, 50, 75, 90, 99]).tolist()
    return Timing(median=median, lower=lower, upper=upper, repeats=len(seconds), p90=p90, p99=p99)


if __name__ == "__main__":
    try:
        result = measure(TypeAdapter(Measurement).validate_json(sys.stdin.read()))
    except QEError as error:
        said = {"kind": type(error).__name__, "problem": error.problem, "remedy": error.remedy}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.exit(REFUSED)
    sys.stdout.write(result.model_dump_json() + "\n")
