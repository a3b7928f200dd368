"""Finding the plugin's library and loading it before an engine that needs it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from qe_edge.runtime import plugin_library, tensorrt_session
from qe_edge.runtime.engine_info import EngineInfo, PluginBuild
from qe_edge.runtime.plugin_library import FILE, VARIABLE, find_plugin_library, load_plugin_library
from qe_edge.runtime.tensorrt_session import Device
from qe_edge.system.errors import TargetError


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """One library in every place that is looked at, in no order."""
    package, checkout = tmp_path / "package" / "qe_edge" / "runtime", tmp_path / "package" / "plugins"
    monkeypatch.setattr(plugin_library, "__file__", str(package / "plugin_library.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "variable.so"))
    found = {
        "environment": tmp_path / "variable.so",
        "package": tmp_path / "package" / "qe_edge" / "lib" / FILE,
        "cache": tmp_path / "cache" / "qe-edge" / "plugin" / FILE,
        "checkout": checkout / "build" / "plugin" / FILE,
    }
    for path in (*found.values(), checkout / "CMakeLists.txt", tmp_path / "chosen.so"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
    return found


def test_the_order_of_the_places(places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_plugin_library(tmp_path / "chosen.so") == tmp_path / "chosen.so"
    assert find_plugin_library() == places["environment"]
    monkeypatch.delenv(VARIABLE)
    for name in ("package", "cache", "checkout"):
        assert find_plugin_library() == places[name]
        places[name].unlink()
    with pytest.raises(TargetError, match=r"libqe_plugin\.so is not on this machine") as caught:
        find_plugin_library()
    assert "qe-edge build-plugin" in caught.value.remedy


def test_what_is_named_must_exist(places: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no plugin library '.*nothing\.so'"):
        find_plugin_library(tmp_path / "nothing.so")
    places["environment"].unlink()
    with pytest.raises(TargetError, match=r"no plugin library '.*variable\.so'"):
        find_plugin_library()


class Registry:
    """TensorRT's, which knows the plugin after the right library was loaded."""

    def __init__(self, *, works: bool = True) -> None:
        self.works, self.loaded = works, list[str]()

    def get_creator(self, name: str, version: str, namespace: str) -> object | None:
        known = (name, version, namespace) == ("QELinear", "1", "")
        return object() if known and self.loaded and self.works else None

    def load_library(self, path: str) -> object:
        self.loaded.append(path)
        return object()


def tensorrt(registry: Registry) -> SimpleNamespace:
    return SimpleNamespace(__name__="tensorrt", __version__="10.7", get_plugin_registry=lambda: registry)


def test_the_library_is_loaded_once(tmp_path: Path) -> None:
    registry = Registry()
    for _ in range(2):
        load_plugin_library(tensorrt(registry), tmp_path / FILE)
    assert registry.loaded == [str(tmp_path / FILE)]


def test_a_library_that_brings_no_plugin(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"tensorrt 10\.7 cannot load the plugin library"):
        load_plugin_library(tensorrt(Registry(works=False)), tmp_path / FILE)


class Driver:
    def open_context(self) -> None:
        raise RuntimeError("the GPU was opened")


def info(plugin: PluginBuild | None) -> EngineInfo:
    return EngineInfo(
        target="tensorrt", backend="tensorrt", version="10.7", graphs={}, plugin=plugin, manifest="0" * 64
    )


def test_engines_with_the_plugin_load_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, needed = Registry(), PluginBuild(sha256="0" * 64, layout_version=2)
    monkeypatch.setattr(tensorrt_session, "_library_of", lambda _info: tensorrt(registry))
    monkeypatch.setattr(tensorrt_session, "Driver", Driver)
    with pytest.raises(TargetError, match="There is no plugin library"):
        Device(info(needed), tmp_path / FILE)
    (tmp_path / FILE).touch()
    with pytest.raises(RuntimeError, match="the GPU was opened"):
        Device(info(needed), tmp_path / FILE)
    assert registry.loaded == [str(tmp_path / FILE)]
    with pytest.raises(RuntimeError, match="the GPU was opened"):
        Device(info(None), tmp_path / "not.so")
    assert len(registry.loaded) == 1
