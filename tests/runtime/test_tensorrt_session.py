"""The TensorRT backend without a GPU: the driver's memory is the host's, and ONNX Runtime stands in for the engine.

What cannot be checked here is the library itself; what is checked is everything between it and the model.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from qe_edge.models.family import Sample
from qe_edge.runtime import tensorrt_session
from qe_edge.runtime.cuda import Driver
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import InputError, TargetError
from tests.conftest import Exported
from tests.runtime.host_tensorrt import HostDriver, install, lowered_engines
from tests.sealing import seal


@pytest.fixture(scope="module", params=["two caches", "in place"])
def engines(exported: Exported, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "tensorrt"
    return lowered_engines(exported.onnx, folder, in_place=request.param == "in place")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    """A machine that seems to have a GPU and TensorRT."""
    return install(monkeypatch)


def test_answers_come_through_device_memory(
    engines: Path, exported: Exported, driver: HostDriver, held_out: list[Sample]
) -> None:
    expected = VisionLanguageEngine.load(exported.onnx, threads=1)
    engine = VisionLanguageEngine.load(engines)
    assert engine.generate(held_out[:3], 5) == expected.generate(held_out[:3], 5)
    encoded = engine.encode(held_out[:3], answers=True)
    valid = encoded.attention_mask == 1
    difference = (engine.logits(encoded) - expected.logits(encoded))[valid]
    assert np.abs(difference).max() < 1
    del engine
    assert driver.blocks == {}  # every buffer was given back


def test_the_cache_stays_on_the_device(engines: Path, driver: HostDriver, held_out: list[Sample]) -> None:
    engine = VisionLanguageEngine.load(engines)
    encoded = engine.encode(held_out[:1])
    _, state = engine.prefill(encoded, engine.features(encoded))
    buffers = [*state.cache.past.values(), *state.cache.present.values()]
    assert {type(value) for value in buffers} == {tensorrt_session.Buffer}
    assert {value.dtype.name for value in buffers} == {"float16"}
    in_place = engine.manifest.kv.in_place
    assert len({id(value) for value in buffers}) == len(state.cache.past) * (1 if in_place else 2)
    engine.decode(state, np.array([5]))
    taken = set(driver.blocks)
    for token in (6, 7):
        engine.decode(state, np.array([token]))
    assert set(driver.blocks) == taken  # nothing is allocated for a token
    session = engine._sessions["language"]
    assert session._context.profiles == [0, 1]  # type: ignore[attr-defined]


def test_more_than_the_engine_was_built_for(engines: Path, driver: HostDriver, held_out: list[Sample]) -> None:
    engine = VisionLanguageEngine.load(engines)
    with pytest.raises(InputError, match="does not take 5 questions at a time: it was built for 4"):
        engine.generate([held_out[0]] * 5, 2)


def test_an_engine_of_another_version(engines: Path, driver: HostDriver, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(engines, tmp_path / "engines"))
    (folder / "visual.engine").write_bytes(b"")
    seal(folder)
    with pytest.raises(TargetError, match=r"built with tensorrt 10\.3 and cannot be loaded by 10\.7") as caught:
        VisionLanguageEngine.load(folder)
    assert "Build the target 'tensorrt' again" in caught.value.remedy


def test_the_library_is_missing(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    monkeypatch.setattr(tensorrt_session, "Driver", HostDriver)
    with pytest.raises(TargetError, match="tensorrt, which is not installed"):
        VisionLanguageEngine.load(engines)


def test_the_fake_driver_has_the_real_ones_calls() -> None:
    calls = {name for name in vars(HostDriver) if not name.startswith("_")}
    assert calls <= set(vars(Driver))
