"""Nothing that lies in the current folder is run: no module, no program, no library, no data set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from qe_edge import doctor
from qe_edge.calibration.sources import load_samples
from qe_edge.export.engine import EngineRequest, build_engine
from qe_edge.export.plugin_build import find_toolchain
from qe_edge.export.plugin_check import choose_plugin
from qe_edge.runtime.plugin_library import FILE, VARIABLE, build_folder, find_plugin_library
from qe_edge.system.child_process import (
    OPTIONS,
    find_program,
    forget_current_folder,
    isolated_code,
    isolated_module,
    safe_environment,
    without_current_folder,
)
from qe_edge.system.errors import ArtifactError, CalibrationError, TargetError
from qe_edge.validate.latency import Measurement, _in_child
from tests import fake_tensorrt

MODULES = (
    "numpy", "json", "torch", "site", "sitecustomize", "usercustomize", "linecache", "runpy", "traceback", "pydantic",
    "importlib", "onnxruntime", "tensorrt_rtx",
)  # fmt: skip
FOLDERS = ("qe_edge", "encodings", "collections", "PIL")
PROGRAMS = ("nvcc", "nvidia-smi", "cmake", "ninja", "g++", "tegrastats")


class Downloads:
    """A folder of hostile files, which say that they ran."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._mark = folder, folder.parent / "executed"
        folder.mkdir()
        line = f"open({str(self._mark)!r}, 'a').write(__file__ + chr(10))\n"
        for path in (*(f"{name}.py" for name in MODULES), *(f"{name}/__init__.py" for name in FOLDERS)):
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(line, encoding="utf-8")
        for name in PROGRAMS:
            (folder / name).write_text(f"#!/bin/sh\necho {name} >> {self._mark}\n", encoding="utf-8")
            (folder / name).chmod(0o755)

    def executed(self) -> str:
        return self._mark.read_text(encoding="utf-8") if self._mark.exists() else ""


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """The current folder; the search paths are as careless users have them."""
    made = Downloads(tmp_path / "downloads")
    monkeypatch.chdir(made.folder)
    monkeypatch.setenv("PATH", f":.:{os.environ['PATH']}:./")
    monkeypatch.setenv("PYTHONPATH", ":.")
    monkeypatch.setenv("LD_LIBRARY_PATH", ":/nothing")
    return made


def test_the_hostile_files_work(downloads: Downloads) -> None:
    environment = {**os.environ, "PYTHONPATH": ""}  # not even Python itself starts with the folder 'encodings'
    subprocess.run([sys.executable, "-c", "import numpy"], check=False, capture_output=True, env=environment)
    assert "numpy.py" in downloads.executed()


def test_doctor(downloads: Downloads) -> None:
    seen = {name: doctor._result(doctor._start(code)) for name, code in doctor.PROBES.items()}
    assert isinstance(seen["numpy"], dict)
    assert isinstance(seen["torch"], dict)
    findings = [*doctor._runtimes(seen), *doctor._gpu(seen)]
    assert downloads.executed() == ""
    assert all("downloads" not in item.detail for item in findings)


def test_the_builder_of_engines(downloads: Downloads, tmp_path: Path) -> None:
    request = EngineRequest("tensorrt", tmp_path / "a.onnx", tmp_path / "a.engine", tmp_path / "facts.json", {})
    with pytest.raises(TargetError, match=r"crashed|reported nothing|refuses"):
        build_engine(request)
    assert downloads.executed() == ""


def test_the_check_of_the_plugin(downloads: Downloads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tensorrt.install(tmp_path, monkeypatch)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}:.")  # what is named by its path is found
    library = fake_tensorrt.library(tmp_path)
    assert choose_plugin(["tensorrt"], library) == library
    assert downloads.executed() == ""


def test_measuring_speed(downloads: Downloads, tmp_path: Path) -> None:
    wanted = Measurement("onnxruntime", "", str(tmp_path / "no-engine"), 0, 1, "what?", ())
    with pytest.raises(ArtifactError, match="no-engine"):
        _in_child(wanted)
    assert downloads.executed() == ""


def test_compilers(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROGRAMS:
        assert not (find_program(name) or "").startswith(str(downloads.folder))
    monkeypatch.setenv("PATH", ".")
    assert find_program("cmake") is None or find_program("cmake") in ("/bin/cmake", "/usr/bin/cmake")
    with pytest.raises(TargetError, match="Building the plugin needs"):
        find_toolchain()
    assert downloads.executed() == ""


def test_the_command_line_itself(downloads: Downloads) -> None:
    code = "import sys; from qe_edge.cli import main; sys.exit(main())"
    (downloads.folder / "click.py").write_text("raise SystemExit('executed')", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": ""}  # else Python runs sitecustomize.py before any of our lines
    for path in ("site.py", "json.py", "linecache.py", "importlib.py", "traceback.py"):
        (downloads.folder / path).unlink()  # of a -c, some Pythons import these themselves
    for folder in FOLDERS:
        (downloads.folder / folder / "__init__.py").unlink()
        (downloads.folder / folder).rmdir()
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "demo", "--device", "orin-nano"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert downloads.executed() == ""


@pytest.mark.parametrize("named", [False, True])
def test_what_python_ran_before_our_first_line_is_said(tmp_path: Path, named: bool) -> None:
    """Nothing of ours can keep Python from running it."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.stderr.write('ran\\n')", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path) if named else ":"}
    code = "import sys; from qe_edge.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, *OPTIONS, "-c", code, "predict", "demo", "--device", "orin-nano"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("ran\n")
    assert ("sitecustomize.py' of the current folder" in done.stderr) != named
    assert done.stderr.count("ran\n") == 1  # no helper runs it again


def test_search_paths_of_this_process(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    here = str(Path.cwd())
    monkeypatch.setattr(sys, "path", ["", here, "/named"])
    assert forget_current_folder() == []
    assert sys.path == ["/named"]
    assert not {"", "."} & set(os.environ["PATH"].split(os.pathsep))
    assert os.environ["LD_LIBRARY_PATH"] == "/nothing"
    assert "PYTHONPATH" not in os.environ
    monkeypatch.setenv("PYTHONPATH", f":{here}")  # it is named, too
    monkeypatch.setattr(sys, "path", ["", here])
    forget_current_folder()
    assert sys.path == [here]


def test_a_current_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    forget_current_folder()


def test_an_empty_path_is_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", ":./:")
    assert "PATH" not in safe_environment()
    assert without_current_folder("a:::.//:./b") == "a:./b"


def test_helpers_keep_exit_codes_and_arguments() -> None:
    done = subprocess.run([*isolated_code("import sys; sys.exit(sys.argv[1:] == ['x'])"), "x"], check=False)
    assert done.returncode == 1
    listed = subprocess.run([*isolated_module("this"), "y"], capture_output=True, check=True, text=True)
    assert listed.stdout.startswith("The Zen of Python")


def test_no_library_from_here(downloads: Downloads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for path in (FILE, f"qe-edge/plugin/{FILE}", f"build/plugin/{FILE}", f"lib/{FILE}"):
        (downloads.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (downloads.folder / path).touch()
    for folder in ("", ".", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", folder)
        assert build_folder() == Path.home() / ".cache" / "qe-edge" / "plugin"
    with suppress(TargetError):  # there is none on this machine
        assert downloads.folder not in find_plugin_library().parents


def test_a_folder_does_not_pass_for_a_public_data_set(downloads: Downloads) -> None:
    pytest.importorskip("datasets")
    (downloads.folder / "lmms-lab" / "COCO-Caption2017").mkdir(parents=True)
    with pytest.raises(CalibrationError, match="hides the public data set of that name") as caught:
        load_samples("coco", 1)
    assert "Run the command in another folder" in caught.value.remedy


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs ONNX Runtime")
def test_nothing_is_left_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would leave a device id and a queue of events for its maker."""
    for name in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    code = "import qe_edge, onnxruntime; onnxruntime.InferenceSession; print(onnxruntime.__version__)"
    subprocess.run(isolated_code(code), check=True, capture_output=True, env=safe_environment())
    assert list(tmp_path.rglob("*")) == []
