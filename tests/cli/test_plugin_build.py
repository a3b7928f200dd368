"""`qe-edge build-plugin` with stand-ins for the compilers; the plugin's ladder compiles the real thing."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from qe_edge.export import plugin_build
from qe_edge.export.plugin_build import HEADER, build_plugin, find_toolchain
from qe_edge.runtime.plugin_library import FILE, find_operator_library
from qe_edge.system.errors import InputError, TargetError
from tests.cli.running import Run, assert_two_lines

ARCH = platform.machine()
OTHER = next(name for name in plugin_build.ARCHITECTURES if name != ARCH)
CMAKE = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = --build ] || exit 0
echo binary > "$2/libqe_plugin.so"
echo operator > "$2/libqe_ort.so"
"""
NVCC = '#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88"\nexit 0\n'


class Machine:
    """A folder of programs that is all of PATH, and one of headers."""

    def __init__(self, folder: Path) -> None:
        self.programs, self.headers, self.log = folder / "programs", folder / "headers", folder / "log"
        self.programs.mkdir()
        self.headers.mkdir()
        (self.headers / HEADER).touch()
        self.add("cmake", CMAKE.format(log=self.log))
        self.add("nvcc", NVCC)
        self.add("g++", "#!/bin/sh\n")

    def add(self, name: str, script: str) -> None:
        (self.programs / name).write_text(script, encoding="utf-8")
        (self.programs / name).chmod(0o755)

    def remove(self, name: str) -> None:
        (self.programs / name).unlink()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setenv("PATH", f"{made.programs}:/usr/bin/nothing:/bin/nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plugin_build, "TOOLKIT", tmp_path / "no-toolkit")
    monkeypatch.setattr(plugin_build, "_from_pypi", lambda _file: None)
    return made


def test_the_library_lands_where_build_finds_it(machine: Machine, tmp_path: Path) -> None:
    machine.add("cmake", CMAKE.format(log=machine.log).replace("#!/bin/sh", "#!/bin/sh\nPATH=/bin:/usr/bin"))
    library = build_plugin(find_toolchain(headers=machine.headers))
    assert library == tmp_path / "cache" / "qe-edge" / "plugin" / FILE
    assert library.read_text(encoding="utf-8") == "binary\n"
    operator = find_operator_library(library)
    assert operator.read_text(encoding="utf-8") == "operator\n"
    operator.unlink()
    with pytest.raises(TargetError, match=r"no libqe_ort\.so beside it") as caught:
        find_operator_library(library)
    assert "build-plugin" in caught.value.remedy
    configure, compile_ = machine.log.read_text(encoding="utf-8").splitlines()
    assert f"-DQE_TENSORRT_INCLUDE={machine.headers}" in configure
    assert f"-DQE_NVCC={machine.programs / 'nvcc'}" in configure
    assert "TOOLCHAIN" not in configure
    assert "-DQE_PTXAS12" not in configure
    assert compile_.startswith("--build ")


def test_another_architecture_is_cross_built(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=f"needs {OTHER}-linux-gnu-g"):
        find_toolchain(OTHER, machine.headers)
    machine.add(f"{OTHER}-linux-gnu-g++", "#!/bin/sh\n")
    tools = find_toolchain(OTHER, machine.headers)
    assert f"-DCMAKE_TOOLCHAIN_FILE={tools.sources / 'cmake' / f'{OTHER}.cmake'}" in tools.configure(tmp_path)
    assert build_plugin(tools).parent.name == f"plugin-{OTHER}"  # where no build of this machine looks


def test_cuda_12_assembles_for_its_own_chips(machine: Machine, tmp_path: Path) -> None:
    machine.add("nvcc", NVCC.replace("13.0", "12.6"))
    command = find_toolchain(headers=machine.headers).configure(tmp_path)
    assert f"-DQE_PTXAS12={machine.programs / 'ptxas'}" in command
    assert "-DQE_CHIPS=80;86;87;89;90" in command


@pytest.mark.parametrize(
    ("program", "problem", "remedy"),
    [
        ("cmake", "needs CMake", "pip install cmake"),
        ("g++", r"needs g\+\+", "apt-get install g"),
        ("nvcc", "needs nvcc", "pip install nvidia-cuda-nvcc==13.0.88"),
    ],
)
def test_what_is_missing_is_named_with_where_to_get_it(
    machine: Machine, program: str, problem: str, remedy: str
) -> None:
    machine.remove(program)
    with pytest.raises(TargetError, match=problem) as caught:
        find_toolchain(headers=machine.headers)
    assert remedy in caught.value.remedy


def test_missing_headers(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_build, "HEADER", "NvInferThatIsNowhere.h")
    with pytest.raises(TargetError, match="TensorRT's headers") as caught:
        find_toolchain()
    assert "pip install --no-deps kernel-lens==2.0.1" in caught.value.remedy
    with pytest.raises(InputError, match="There is no NvInferThatIsNowhere"):
        find_toolchain(headers=tmp_path)


def test_a_wheel_without_sources(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_build, "checkout", lambda: None)
    monkeypatch.setattr(plugin_build, "files", lambda _package: machine.headers)
    with pytest.raises(TargetError, match="carries no sources") as caught:
        find_toolchain()
    assert "clone" in caught.value.remedy


def test_what_does_not_compile(machine: Machine, tmp_path: Path) -> None:
    machine.add("cmake", "#!/bin/sh\necho 'ok so far'\necho 'plan.cpp:3: error: no such thing'\nexit 1\n")
    with pytest.raises(TargetError, match=r"plan\.cpp:3: error: no such thing") as caught:
        build_plugin(find_toolchain(headers=machine.headers), tmp_path / "out")
    assert "build.log" in caught.value.remedy
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["build.log"]


def test_build_without_a_library(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.export.targets.Target.build_problem", lambda _target: None)
    words = ["build", tmp_path / "onnx", "-o", tmp_path / "engines"]
    gone = tmp_path / "gone.so"
    assert_two_lines(
        cli(*words, "--target", "jetson-orin", "--plugin", "--plugin-library", gone), f"'{gone}'", "build-plugin"
    )
    assert_two_lines(cli(*words, "--target", "cpu", "--plugin"), "takes no TensorRT plugin", "Leave --plugin out")
    assert_two_lines(cli(*words, "--target", "cuda"), "on the plugin's kernels alone", "Add --plugin")
    deploy = ["deploy", "demo", "-o", tmp_path / "out", "--target", "cpu", "--target", "cuda"]
    assert_two_lines(cli(*deploy), "on the plugin's kernels alone", "Add --plugin")


def test_the_command(cli: Run, machine: Machine, tmp_path: Path) -> None:
    outcome = cli("build-plugin", "-o", tmp_path / "out", "--tensorrt-include", machine.headers)
    assert outcome.code == 0, outcome.err
    assert str(tmp_path / "out" / FILE) in outcome.out
    assert "not under JetPack 6" in outcome.err
    assert_two_lines(cli("build-plugin", "--arch", "mips"), "not built for 'mips'", "x86_64 or aarch64")
