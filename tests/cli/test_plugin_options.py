"""`--plugin` and `--plugin-library` of every command that has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qe_edge.models.family import Sample
from qe_edge.prepack.lower import LAYOUT_VERSION
from qe_edge.runtime.engine_info import EngineInfo, GraphBuild, PluginBuild
from qe_edge.system.errors import InputError
from qe_edge.validate import latency
from qe_edge.validate.latency import Measurement, measure_latency
from qe_edge.validate.schema import Latency, Timing
from qe_edge.validate.targets import runtime_name, target_states
from tests import fake_tensorrt
from tests.cli.running import Run, assert_two_lines

DEPLOY = ["deploy", "demo", "-o", "out", "--samples", "1", "--limit", "1", "--method", "rtn"]
INFO = EngineInfo(
    target="tensorrt",
    backend="tensorrt",
    version="10.7",
    graphs={"language": GraphBuild(size=1, seconds=1, plugin_nodes=("a", "b"), plugin_layers=("a",))},
    plugin=PluginBuild(sha256="0" * 64, layout_version=LAYOUT_VERSION),
    manifest="0" * 64,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; TensorRT seems to be installed, and there is no GPU."""
    tools, work = tmp_path / "tools", tmp_path / "work"
    tools.mkdir()
    work.mkdir()
    fake_tensorrt.install(tools, monkeypatch)
    monkeypatch.setattr("qe_edge.runtime.cuda.LIBRARY", "libcuda-that-is-nowhere.so")
    monkeypatch.setattr("qe_edge.export.targets.compute_capability", lambda: None)
    monkeypatch.chdir(work)
    return tmp_path


@pytest.fixture
def engines(folder: Path) -> Path:
    """Engines of which only the description and the manifest's name exist."""
    made = folder / "engines"
    made.mkdir()
    (made / "manifest.json").write_text("{}")
    INFO.write(made)
    return made


def test_deploy_finds_mistakes_before_any_work(cli: Run, folder: Path) -> None:
    gone, good = folder / "gone.so", fake_tensorrt.library(folder)
    on_gpu = [*DEPLOY, "--target", "cpu", "--target", "tensorrt"]
    assert_two_lines(cli(*on_gpu, "--plugin", "--plugin-library", gone), f"no plugin library '{gone}'", "build-plugin")
    assert_two_lines(cli(*DEPLOY, "--plugin-library", good), "takes no TensorRT plugin", "Leave --plugin out")
    assert_two_lines(
        cli(*on_gpu, "--plugin-library", fake_tensorrt.library(folder, 7)), "another layout", "build-plugin"
    )
    assert list(Path().iterdir()) == []


def test_deploy_asks_the_plugin_about_the_layers_before_any_work(cli: Run, folder: Path) -> None:
    words = ["--target", "tensorrt", "--plugin-library", fake_tensorrt.library(folder), "--scheme", "w2a16"]
    plain = [word for word in DEPLOY if word not in ("--method", "rtn")]
    outcome = cli(*plain, *words, "--method", "qe", "--bits", "5")
    assert_two_lines(outcome, "The plugin cannot run the layer 'model.", "Build without --plugin")
    assert "group_size is 32" in outcome.err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("words", [["run", "--prompt", "is it?"], ["bench"]])
def test_engines_without_a_gpu(cli: Run, engines: Path, words: list[str]) -> None:
    outcome = cli(words[0], engines, *words[1:], "--plugin-library", "x.so")
    assert_two_lines(outcome, "needs an NVIDIA GPU", "use the 'cpu' target here")


def test_validate_without_a_gpu(cli: Run, engines: Path, folder: Path) -> None:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "qe-edge"}}')
    words = ["validate", "demo", checkpoint, "--engines", engines, "-o", "report.json"]
    assert_two_lines(cli(*words, "--plugin-library", "x.so"), "needs an NVIDIA GPU", "use the 'cpu' target here")


def test_a_missing_library_is_told_before_anything_is_measured(
    cli: Run, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qe_edge.runtime.tensorrt_session.Driver", object)
    monkeypatch.syspath_prepend(str(engines.parent / "tools"))
    assert_two_lines(
        cli("bench", engines, "--plugin-library", "gone.so"), "no plugin library 'gone.so'", "build-plugin"
    )


def test_speed_is_measured_with_the_library(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Measurement] = []

    def measure(measurement: Measurement) -> Latency:
        asked.append(measurement)
        steps = dict.fromkeys(("first_token", "decode"), Timing(median=1, lower=1, upper=1, repeats=1))
        return Latency(runtime="", setting="", steps=steps, prompt_tokens=1, threads=1, peak_bytes=1)

    monkeypatch.setattr(latency, "_in_child", measure)
    monkeypatch.setattr(latency, "check_runnable", lambda *_: None)
    measure_latency(engines, Sample(None, "is it?"), original="demo", plugin_library=Path("x.so"))
    assert [(each.runtime, each.setting) for each in asked] == [
        ("tensorrt", "10.7, with the plugin"), ("pytorch", "float32"),
    ]  # fmt: skip
    assert asked[0].plugin_library == "x.so"


def test_threads_of_engines_that_use_none(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "check_runnable", lambda *_: None)
    with pytest.raises(InputError, match="use no threads"):
        measure_latency(engines, Sample(None, "is it?"), threads=2)


def test_the_report_counts_plugin_nodes(engines: Path) -> None:
    (state,) = target_states(None, [engines])
    assert (state.plugin_nodes, state.validated) == (2, False)
    assert runtime_name(INFO) == "TensorRT 10.7 with the plugin"
    assert runtime_name(None) == "ONNX Runtime"
