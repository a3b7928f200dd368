"""The target 'cuda' without a GPU: the same session class on ONNX Runtime's CPU provider.

The lowered graphs have their layers in standard operators here; `plugins/tests/test_onnxruntime.py` has the operator.
What cannot be checked is the provider itself.
"""

from __future__ import annotations

import os
import threading
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest

from qe_edge.cli.build_work import _gpu_memory
from qe_edge.export import build
from qe_edge.export.build import build_engines
from qe_edge.export.lowering.cuda import lower_for_cuda
from qe_edge.export.targets import get_target
from qe_edge.models.family import Sample
from qe_edge.runtime import cuda_provider, ort_cuda_session
from qe_edge.runtime.backends import check_runnable
from qe_edge.runtime.cuda_provider import PROVIDER
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.runtime.manifest import read_manifest
from qe_edge.runtime.ort_cuda_session import OrtBuffer, OrtDevice, OrtDeviceSession, open_device
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.runtime.plugin_library import FILE, OPERATOR_FILE
from qe_edge.system.errors import ArtifactError, InputError, ResourceError, TargetError
from tests.conftest import Exported

ON_CPU = OrtDevice(None, "CPUExecutionProvider", "cpu", {})


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plugin library that nobody loads, and the operator's beside it."""
    folder = tmp_path_factory.mktemp("library")
    for name in (FILE, OPERATOR_FILE):
        (folder / name).write_bytes(b"a library")
    return folder / FILE


@pytest.fixture(scope="module")
def engines(exported: Exported, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `qe-edge build --target cuda --plugin` writes them, with layers in standard operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "check_forms", lambda *_: None)
        patch.setattr(build, "lower_for_cuda", lambda model: lower_for_cuda(model, plugin=False))
        return build_engines(exported.onnx, tmp_path_factory.mktemp("engines") / "cuda", "cuda", plugin_library=library)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.runtime.backends.open_device", lambda _info, _library=None: ON_CPU)


def test_answers_are_those_of_the_cpu(engines: Path, exported: Exported, on_cpu: None, held_out: list[Sample]) -> None:
    expected = VisionLanguageEngine.load(exported.onnx, threads=1)
    engine = VisionLanguageEngine.load(engines)
    assert engine.generate(held_out[:3], 5) == expected.generate(held_out[:3], 5)
    encoded = engine.encode(held_out[:3], answers=True)
    valid = encoded.attention_mask == 1
    found, wanted = engine.logits(encoded)[valid], expected.logits(encoded)[valid]
    assert np.abs(found - wanted).max() < 0.02 * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.98


def test_the_cache_is_in_float16_and_stays_where_it_is(engines: Path, on_cpu: None, held_out: list[Sample]) -> None:
    engine = VisionLanguageEngine.load(engines)
    encoded = engine.encode(held_out[:1])
    _, state = engine.prefill(encoded, engine.features(encoded))
    buffers = [*state.cache.past.values(), *state.cache.present.values()]
    assert {type(value) for value in buffers} == {OrtBuffer}
    assert {value.dtype.name for value in buffers} == {"float16"}
    assert len({id(value) for value in buffers}) == len(state.cache.past)  # read and written in place
    places = {name: buffer.value.data_ptr() for name, buffer in state.cache.past.items()}  # type: ignore[union-attr]
    session = engine._sessions["language"]
    assert isinstance(session, OrtDeviceSession)
    taken = []
    for token in (5, 6, 7):
        engine.decode(state, np.array([token]))
        rooms = {name: room.value.data_ptr() for (name, _), room in session._rooms.items() if name != "attention_mask"}
        taken.append(rooms)
    assert taken[0] == taken[1] == taken[2]
    assert {name: buffer.value.data_ptr() for name, buffer in state.cache.past.items()} == places  # type: ignore[union-attr]


def test_steps_are_recorded_where_their_tensors_stay(
    engines: Path, on_cpu: None, held_out: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ONNX Runtime is asked to record; the CPU provider runs every call as it is."""
    numbers: list[int] = []
    add = ort.RunOptions.add_run_config_entry

    def noted(options: ort.RunOptions, key: str, value: str) -> None:
        assert key == "gpu_graph_id"
        numbers.append(int(value))
        add(options, key, value)

    monkeypatch.setattr(ort.RunOptions, "add_run_config_entry", noted)
    plain, engine = VisionLanguageEngine.load(engines), VisionLanguageEngine.load(engines, cuda_graph=True)
    expected = [plain.generate([sample], 5) for sample in held_out[:3]]
    assert numbers == []
    encoded = engine.encode(held_out[:1])
    logits, state = engine.prefill(encoded, engine.features(encoded), 8)
    for _ in range(4):
        logits = engine.decode(state, engine.next_tokens(logits, state))
    assert numbers == [-1, -1, 0, 0, 0]  # the prompt; the first step, whose outputs get their places; then one graph
    assert [engine.generate([sample], 5) for sample in held_out[:3]] == expected
    assert engine.generate(held_out[:3], 5) == plain.generate(held_out[:3], 5)
    for _ in range(10):  # caches at other places have graphs of their own, and there are not many of these
        _, state = engine.prefill(encoded, engine.features(encoded), 8)
        kept = [engine.decode(state, np.array([5])) for _ in range(2)]
        assert np.isfinite(kept).all()
    assert max(numbers) < ort_cuda_session.MOST_GRAPHS


def test_other_targets_record_nothing(exported: Exported) -> None:
    with pytest.raises(InputError, match="Only engines of the target 'cuda' record CUDA graphs"):
        VisionLanguageEngine.load(exported.onnx, cuda_graph=True)


def merger(engines: Path, device: OrtDevice) -> OrtDeviceSession:
    return OrtDeviceSession(engines, read_manifest(engines).graphs["merger"], device)


def test_inputs_are_copied(engines: Path) -> None:
    """A room that is used again is none of the caller's arrays."""
    session = merger(engines, ON_CPU)
    first, second = np.ones((2, 4, 192), np.float32), np.full((2, 4, 192), 2, np.float32)
    outputs = [np.array(session.run({"hidden_states": array})["image_features"]) for array in (first, second, first)]
    assert (first == 1).all()
    assert (outputs[0] == outputs[2]).all()
    assert session.run({"hidden_states": np.ones((3, 4, 192), np.float32)})["image_features"].shape[0] == 3


def test_what_fails_is_said(engines: Path) -> None:
    session = merger(engines, ON_CPU)
    with pytest.raises(ResourceError, match=r"ONNX Runtime failed in 'merger\.onnx'"):
        session.run({"hidden_states": np.ones((2, 4, 191), np.float32)})


def test_two_threads_take_turns(engines: Path, exported: Exported, on_cpu: None, held_out: list[Sample]) -> None:
    expected = VisionLanguageEngine.load(exported.onnx, threads=1).generate(held_out[:1], 4)
    pipeline = Pipeline(VisionLanguageEngine.load(engines), slots=2)
    answers: list[str] = []
    question = held_out[0]

    def ask() -> None:
        answers.append(pipeline(question, max_new_tokens=4, temperature=0).text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected * 4


def test_what_the_build_says(engines: Path) -> None:
    info = read_engine_info(engines)
    assert info is not None
    assert (info.target, info.backend, info.version) == ("cuda", "onnxruntime_cuda", ort.__version__)
    assert not info.sized
    assert info.plugin is not None
    # two layers with two heads of 32: 512 bytes a token
    assert _gpu_memory(engines).endswith(" MiB, and a KV cache 500.0 KiB for 1000 tokens.")


def test_a_machine_without_a_gpu(engines: Path) -> None:
    with pytest.raises(TargetError, match="needs an NVIDIA GPU") as caught:
        VisionLanguageEngine.load(engines)
    assert "'cpu'" in caught.value.remedy
    with pytest.raises(TargetError, match="needs an NVIDIA GPU"):
        check_runnable(engines)
    with pytest.raises(InputError, match="use no threads of the CPU"):
        VisionLanguageEngine.load(engines, threads=2)
    assert "needs an NVIDIA GPU" in (get_target("cuda").run_problem() or "")
    assert get_target("cuda").build_problem() is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine that seems to have a GPU."""
    found = SimpleNamespace(capability=(8, 9))
    monkeypatch.setattr(cuda_provider, "Driver", lambda: SimpleNamespace(compute_capability=lambda: found.capability))
    monkeypatch.setattr("qe_edge.export.targets.compute_capability", lambda: found.capability)
    return found


def test_onnx_runtime_without_its_provider(
    engines: Path, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match="has no CUDA provider") as caught:
        VisionLanguageEngine.load(engines)
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]'" in caught.value.remedy
    assert "has no CUDA provider" in (get_target("cuda").run_problem() or "")
    monkeypatch.setattr(metadata, "version", lambda _name: "1.31.1")
    with pytest.raises(TargetError, match="onnxruntime was installed over onnxruntime-gpu"):
        VisionLanguageEngine.load(engines)
    gpu.capability = (7, 5)
    with pytest.raises(TargetError, match=r"compute capability 7\.5, and the kernels need 8\.0"):
        VisionLanguageEngine.load(engines)
    assert "sm_75" in (get_target("cuda").run_problem() or "")


def test_a_provider_that_does_not_start_is_no_silent_cpu(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="cannot start its CUDA provider") as caught:
        OrtDevice(None).start()
    assert "onnxruntime-gpu" in caught.value.remedy

    def no_library(_options: object, _name: str, _values: object) -> None:
        os.write(2, b"Failed to load library x with error: libcublasLt.so.13: cannot open shared object file")
        raise RuntimeError("Provider configuration is not supported.")

    monkeypatch.setattr(ort.SessionOptions, "add_provider", no_library)
    with pytest.raises(TargetError, match=r"cannot start its CUDA provider\. libcublasLt\.so\.13 is missing\."):
        OrtDevice(None).start()
    with (
        pytest.warns(UserWarning, match="not in available provider names"),  # and goes on with the CPU's
        pytest.raises(TargetError, match="cannot start its CUDA provider"),
    ):
        merger(engines, OrtDevice(None))


def test_libraries_that_are_missing_or_broken(
    engines: Path, library: Path, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda_provider, "provider_problem", lambda: None)
    monkeypatch.setattr(ort.SessionOptions, "add_provider", lambda *_: None)
    info = read_engine_info(engines)
    assert info is not None
    device = open_device(info, library)
    assert (device.operator, device.provider, device.name) == (library.with_name(OPERATOR_FILE), PROVIDER, "cuda")
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load"):
        merger(engines, device)  # the library is none
    alone = tmp_path / FILE
    alone.write_bytes(b"a library")
    with pytest.raises(TargetError, match=r"has no libqe_ort\.so beside it"):
        open_device(info, alone)


def test_the_operators_own_sentences() -> None:
    said = RuntimeError("Exception during initialization: QELinear: The weights are wrong. Build the model again.")
    refused = ort_cuda_session._refusal(said, Path("language.onnx"))
    assert isinstance(refused, TargetError)
    assert (refused.problem, refused.remedy) == ("The weights are wrong.", "Build the model again.")
