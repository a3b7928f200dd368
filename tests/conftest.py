"""Artifacts that several test files share: quantizing and exporting take seconds, so each is made once a session."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; see qe_edge.cli
IN_A_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_A_WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for every worker: more threads would only wait for it

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import hypothesis
import pytest

from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.family import Sample
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from tests.small_vlm import write_small_vlm

hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine makes no test fail
hypothesis.settings.load_profile("untimed")


@dataclass(frozen=True)
class Exported:
    """A quantized small model and the ONNX folder made from it."""

    checkpoint: Path
    onnx: Path


Exports = Callable[[str, str], Exported]


@pytest.fixture(scope="session", autouse=True)
def _collected_seldom() -> None:
    """What is imported stays, and looking through it for cycles takes a tenth of an export."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _operators_read_once() -> Iterator[None]:
    """An export reads torch's table of operators, for a fifth of its time. Here it is read once a session."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(lru_cache(maxsize=None)(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session", autouse=True)
def _graphs_traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tracing takes most of the time of an export."""
    from qe_edge.export.tracing import trace_graph
    from tests.traces import shared

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if IN_A_WORKER else base) / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qe_edge.export.exporter.trace_graph", shared(trace_graph, folder))
        yield


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed is measured in this process and once, because the start of another takes longer than all else."""
    import torch

    from qe_edge.validate.latency import Measurement
    from qe_edge.validate.latency_child import measure
    from qe_edge.validate.schema import Latency

    def once(request: Measurement) -> Latency:
        threads = torch.get_num_threads()
        try:
            return measure(replace(request, repeats=1, seconds=0))
        finally:
            torch.set_num_threads(threads)

    monkeypatch.setattr("qe_edge.validate.latency._in_child", once)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the cut demo model; nobody changes it."""
    return str(write_small_vlm(tmp_path_factory.mktemp("model") / "small"))


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Four questions with pictures that calibration does not see."""
    return load_evaluation("demo")[:4]


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """The cut demo model, all modules quantized by a method in a scheme, and exported."""
    source = write_small_vlm(tmp_path_factory.mktemp("source") / "model")

    @lru_cache
    def make(method: str, scheme: str) -> Exported:
        from qe_edge.export.exporter import export_model

        folder = tmp_path_factory.mktemp(f"{method}-{scheme}")
        options = {"tokens": 256, "em_steps": 1} if method == "qe" else {}
        modules = ("language", "visual", "merger")
        recipe = make_recipe(method=method, scheme=scheme, modules=modules, options=options, calibration={"samples": 4})
        save_quantized(*quantize(str(source), recipe), folder / "checkpoint")
        export_model(folder / "checkpoint", folder / "onnx")
        return Exported(folder / "checkpoint", folder / "onnx")

    return make


@pytest.fixture(scope="session")
def exported(exports: Exports) -> Exported:
    """Quant Experts in w4a8: every tensor that there is, and siblings that share some."""
    return exports("qe", "w4a8")


@pytest.fixture(scope="session")
def held_out() -> list[Sample]:
    """Questions with answers; prompts of different lengths, so that batches are padded."""
    samples = sorted(load_evaluation("demo"), key=lambda sample: len(sample.question))
    return [samples[0], samples[-1], *samples[50:54]]
