"""`--max-...` of `build` and `deploy`, `--threads` and `--accuracy-level` of `run`, and paths in next commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qe_edge.export.engine import EngineFacts, EngineRequest
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.engine_info import EngineInfo, GraphBuild
from qe_edge.runtime.limits import EngineLimits, limits_of
from qe_edge.runtime.manifest import read_manifest
from qe_edge.system.errors import InputError
from tests.cli.running import Run, assert_two_lines
from tests.conftest import Exported

NAMES = ["batch", "context", "prompt", "patches", "tiles"]
PATCHES = 4 * 260


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> list[EngineRequest]:
    """Every target can be built here; what the builder is asked for."""
    asked: list[EngineRequest] = []

    def build(request: EngineRequest) -> EngineFacts:
        asked.append(request)
        request.engine.write_bytes(b"engine")
        return EngineFacts("10.7", size=6)

    monkeypatch.setattr("qe_edge.export.build.build_engine", build)
    monkeypatch.setattr("qe_edge.export.targets.Target.build_problem", lambda _target: None)
    return asked


def test_build_takes_limits_and_tells_them(
    cli: Run, exported: Exported, tmp_path: Path, builder: list[EngineRequest]
) -> None:
    sizes = ["--max-batch", 2, "--max-context", 90, "--max-prompt", 80, "--max-patches", PATCHES]
    outcome = cli("build", exported.onnx, "-o", tmp_path / "engines", "--target", "rtx", *sizes)
    assert outcome.code == 0, outcome.err
    told = f"up to 2 questions at a time, prompts of 80 tokens, 90 in all, pictures of {PATCHES} patches each."
    assert told in outcome.err
    assert limits_of(read_manifest(tmp_path / "engines")) == EngineLimits(2, 90, 80, PATCHES)
    visual = next(request for request in builder if request.engine.name == "visual.engine")
    assert visual.profiles["default"]["position_ids"][2] == (PATCHES // 4, 4, 2)


def test_build_tells_the_limits_of_the_export_without_options(
    cli: Run, exported: Exported, tmp_path: Path, builder: list[EngineRequest]
) -> None:
    outcome = cli("build", exported.onnx, "-o", tmp_path / "engines", "--target", "rtx")
    assert outcome.code == 0, outcome.err
    assert " x 1080 fits" in outcome.err or "does not fit" in outcome.err
    assert len(builder) == 3
    assert limits_of(read_manifest(tmp_path / "engines")) == limits_of(read_manifest(exported.onnx))


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        (["--target", "cpu", "--max-prompt", "9"], "ONNX Runtime have no limits", "Leave the --max options out"),
        (["--target", "rtx", "--max-tiles", "9"], "A 'qwen2_vl' model has no tiles", "Leave --max-tiles out"),
        (["--target", "rtx", "--max-context", "1000000"], "1000000 are asked for", "Lower --max-context"),
        (["--target", "rtx", "--max-context", "20", "--max-prompt", "30"], "A prompt of 30 tokens", "--max-context"),
    ],
)
@pytest.mark.parametrize("command", ["build", "deploy"])
def test_limits_that_make_no_sense(
    cli: Run, exported: Exported, tmp_path: Path, builder: list[EngineRequest], command: str, words: list[str],
    problem: str, remedy: str,
) -> None:  # fmt: skip
    start = [command, exported.onnx if command == "build" else "demo", "-o", tmp_path / "new" / "out"]
    assert_two_lines(cli(*start, *words), problem, remedy)
    assert builder == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "deploy"])
@pytest.mark.parametrize("name", NAMES)
def test_limits_are_at_least_one(cli: Run, tmp_path: Path, command: str, name: str) -> None:
    outcome = cli(command, "demo", "-o", tmp_path / "out", f"--max-{name}", 0)
    assert_two_lines(outcome, f"--max-{name}", "--help")


def _gpu_engines(folder: Path) -> Path:
    """Engines of which only the description exists."""
    folder.mkdir()
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    graphs = {"language": GraphBuild(size=1, seconds=1)}
    EngineInfo(target="rtx", backend="tensorrt_rtx", version="1.2", graphs=graphs, manifest="0" * 64).write(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        (["--threads", "2"], "engines for a GPU, which use no threads", "Leave --threads out"),
        (["--accuracy-level", "4"], "Only ONNX Runtime has accuracy levels", "accuracy level 0"),
    ],
)
def test_engines_of_a_gpu_have_no_threads(
    cli: Run, tmp_path: Path, words: list[str], problem: str, remedy: str
) -> None:
    engines = _gpu_engines(tmp_path / "engines")
    assert_two_lines(cli("run", engines, "--prompt", "is it?", *words), problem, remedy)


def test_run_in_pytorch_has_no_accuracy_level(cli: Run, exported: Exported) -> None:
    outcome = cli("run", exported.checkpoint, "--prompt", "is it?", "--accuracy-level", "4")
    assert_two_lines(outcome, "PyTorch has no accuracy levels", "Leave --accuracy-level out")


def test_run_hands_threads_and_level_on(cli: Run, exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def load(_folder: Path, **options: object) -> VisionLanguageEngine:
        seen.update(options)
        raise InputError("Enough.", "Stop here.")

    monkeypatch.setattr(VisionLanguageEngine, "load", load)
    words = ["run", exported.onnx, "--prompt", "is it?"]
    assert_two_lines(cli(*words, "--threads", "3", "--accuracy-level", "4"), "Enough", "Stop here")
    assert (seen["threads"], seen["accuracy_level"]) == (3, 4)
    cli(*words)
    assert (seen["threads"], seen["accuracy_level"]) == (None, 0)
    assert_two_lines(cli(*words, "--threads", "0"), "--threads", "--help")
    assert_two_lines(cli(*words, "--accuracy-level", "2"), "--accuracy-level", "--help")


def test_next_commands_can_be_pasted(
    cli: Run, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qe_edge.export.exporter.export_model", lambda _checkpoint, out, **_: shutil.copytree(exported.onnx, out)
    )
    checkpoint, onnx, engines = (tmp_path / name for name in ("a b", "it's", "$HOME engines"))
    shutil.copytree(exported.checkpoint, checkpoint)
    outcome = cli("export", checkpoint, "-o", onnx)
    assert outcome.code == 0, outcome.err
    assert f"qe-edge build '{tmp_path}/it'\"'\"'s' -o" in outcome.out
    outcome = cli("build", onnx, "-o", engines)
    assert outcome.code == 0, outcome.err
    assert f"qe-edge run '{engines}' --image" in outcome.out
