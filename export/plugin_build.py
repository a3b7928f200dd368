"""Compiles `libqe_plugin.so`, and `libqe_ort.so` beside it, from the sources that this package carries."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qe_edge.runtime.plugin_library import FILE, OPERATOR_FILE, build_folder, checkout
from qe_edge.system.atomic import atomic_file
from qe_edge.system.child_process import find_program, safe_environment
from qe_edge.system.errors import InputError, TargetError

ARCHITECTURES = ("x86_64", "aarch64")
CUDA13_FROM_PYPI = (
    "nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 "
    "nvidia-cuda-cccl==13.0.85"
)
CUDA12_FROM_PYPI = "nvidia-cuda-nvcc-cu12==12.6.85"
HEADERS_FROM_PYPI = "kernel-lens==2.0.1"
CHIPS12 = "80;86;87;89;90"  # what the ptxas of CUDA 12.6 knows
TOOLKIT = Path("/usr/local/cuda")
HEADER = "NvInferRuntime.h"


@dataclass(frozen=True)
class Toolchain:
    """The programs and files that a build needs, found before it starts.

    Attributes:
        arch: Architecture of the machine that will load the library.
        sources: Folder of CMakeLists.txt.
        cmake: The program.
        nvcc: CUDA's compiler itself, not a wrapper of it.
        headers: Folder of TensorRT's headers.
        ptxas12: Assembler of CUDA 12; without it the library serves CUDA 13 drivers only.
        cuda: Major version of nvcc.
    """

    arch: str
    sources: Path
    cmake: str
    nvcc: Path
    headers: Path
    ptxas12: Path | None
    cuda: int

    def configure(self, work: Path) -> list[str]:
        """CMake's command line to configure the build in `work`."""
        command = [self.cmake, "-S", str(self.sources), "-B", str(work), f"-DQE_NVCC={self.nvcc}",
                   f"-DQE_TENSORRT_INCLUDE={self.headers}"]  # fmt: skip
        if self.ptxas12 is not None:
            command.append(f"-DQE_PTXAS12={self.ptxas12}")
        if self.cuda == 12:
            command.append(f"-DQE_CHIPS={CHIPS12}")
        if self.arch != platform.machine():
            command.append(f"-DCMAKE_TOOLCHAIN_FILE={self.sources / 'cmake' / f'{self.arch}.cmake'}")
        return [*command, "-G", "Ninja"] if find_program("ninja") else command


def find_toolchain(arch: str | None = None, headers: Path | None = None) -> Toolchain:
    """Find the programs and files that a build needs.

    Args:
        arch: "x86_64" or "aarch64"; None for this machine's.
        headers: Folder of TensorRT's headers; None looks for an installed TensorRT, then for the headers from PyPI.

    Raises:
        TargetError: If something is missing; the remedy says where it comes from.
        InputError: If there is no such architecture, or no header in `headers`.

    Example:
        >>> find_toolchain("riscv64")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: The plugin is not built for 'riscv64'. Choose --arch x86_64 or aarch64.
    """
    arch = arch or platform.machine()
    if arch not in ARCHITECTURES:
        raise InputError(f"The plugin is not built for '{arch}'.", f"Choose --arch {' or '.join(ARCHITECTURES)}.")
    sources = _sources()
    cmake = find_program("cmake")
    if cmake is None:
        raise TargetError("Building the plugin needs CMake.", "Run: pip install cmake.")
    compiler = "g++" if arch == platform.machine() else f"{arch}-linux-gnu-g++"
    if find_program(compiler) is None:
        package = "g++" if compiler == "g++" else f"g++-{arch.replace('_', '-')}-linux-gnu"
        raise TargetError(f"Building the plugin for {arch} needs {compiler}.", f"Run: sudo apt-get install {package}.")
    nvcc = _nvcc()
    cuda = _cuda_version(nvcc)
    ptxas12 = nvcc.with_name("ptxas") if cuda == 12 else _from_pypi("nvidia/cuda_nvcc/bin/ptxas")
    return Toolchain(arch, sources, cmake, nvcc, _headers(arch, headers), ptxas12, cuda)


def build_plugin(tools: Toolchain, out: Path | None = None) -> Path:
    """Compile the plugin's library and the library of ONNX Runtime's operator; it takes about a minute.

    Args:
        tools: Programs and files of the build.
        out: Folder for both libraries; None for the folder where QE-Edge looks for them.

    Returns:
        The plugin's library. Each library appears only when it is complete.

    Raises:
        TargetError: If the compilers refuse the sources.

    Example:
        >>> build_plugin(find_toolchain())  # doctest: +SKIP
    """
    native = tools.arch == platform.machine()
    folder = out or build_folder(None if native else tools.arch)
    with tempfile.TemporaryDirectory(prefix="qe-plugin-") as work:
        log = folder / "build.log"
        _run(tools.configure(Path(work)), "CMake refuses to configure the plugin", log)
        _run([tools.cmake, "--build", work, "--parallel", str(os.cpu_count() or 1)], "The plugin does not compile", log)
        for file in (OPERATOR_FILE, FILE):
            with atomic_file(folder / file) as part:
                shutil.copyfile(Path(work) / file, part)
    return folder / FILE


def _sources() -> Path:
    carried = Path(str(files("qe_edge"))) / "plugin_sources"
    for folder in (carried, checkout()):
        if folder is not None and (folder / "CMakeLists.txt").is_file():
            return folder
    raise TargetError(
        "This installation of QE-Edge carries no sources of the plugin.",
        "Install it again from its wheel, or use a clone of its repository.",
    )


def _nvcc() -> Path:
    """CUDA's compiler: of PATH, of the toolkit's usual place, or of PyPI's packages in this environment."""
    candidates = (find_program("nvcc"), TOOLKIT / "bin" / "nvcc", _from_pypi("nvidia/cu13/bin/nvcc"))
    found = next((Path(path) for path in candidates if path and os.access(path, os.X_OK)), None)
    if found is None:
        raise TargetError(
            "Building the plugin needs nvcc, the compiler of CUDA 13 or 12.",
            f"Install the CUDA toolkit, or run: pip install {CUDA13_FROM_PYPI}.",
        )
    # a wrapper on PATH hides where its toolkit is, and CMake needs that; nvcc itself tells
    tries = _call(str(found), "--dryrun", "-x", "cu", os.devnull)
    here = re.search(r"^#\$ _HERE_=(.+)$", tries.stderr + tries.stdout, re.MULTILINE)
    inside = Path(here.group(1)) / "nvcc" if here else found
    return inside if inside.is_file() else found


def _cuda_version(nvcc: Path) -> int:
    done = _call(str(nvcc), "--version")
    release = re.search(r"release (\d+)\.", done.stdout)
    if release is None or int(release.group(1)) < 12:
        raise TargetError(f"'{nvcc}' is not the compiler of CUDA 12 or later.", "Install CUDA 13 or 12.6.")
    return int(release.group(1))


def _headers(arch: str, chosen: Path | None) -> Path:
    """Folder of TensorRT's headers."""
    if chosen is not None:
        if not (chosen / HEADER).is_file():
            raise InputError(f"There is no {HEADER} in '{chosen}'.", "Give TensorRT's include folder.")
        return chosen
    pypi = _from_pypi(f"kernel_lens/include/tensorrt/{HEADER}")
    places = (
        Path(f"/usr/include/{arch}-linux-gnu"), Path("/usr/local/tensorrt/include"), pypi.parent if pypi else None,
    )  # fmt: skip
    found = next((folder for folder in places if folder and (folder / HEADER).is_file()), None)
    if found is None:
        raise TargetError(
            f"Building the plugin needs TensorRT's headers, and {HEADER} is not on this machine.",
            f"Install TensorRT (JetPack brings it), or run: pip install --no-deps {HEADERS_FROM_PYPI}.",
        )
    return found


def _from_pypi(file: str) -> Path | None:
    """A file of a package in this environment; programs are made executable, which some wheels forget."""
    path = Path(sysconfig.get_path("purelib")) / file
    if not path.is_file():
        return None
    if path.parent.name == "bin":
        for program in (*path.parent.iterdir(), *path.parent.parent.glob("nvvm/bin/*")):
            program.chmod(program.stat().st_mode | 0o111)
    return path


def _call(*command: str, errors: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; it finds others on PATH, and none in the current folder."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False, env=safe_environment()
    )


def _run(command: list[str], problem: str, log: Path) -> None:
    """Run a step; what it says when it fails goes into `log`."""
    done = _call(*command, errors=subprocess.STDOUT)
    if done.returncode:
        with atomic_file(log) as part:
            part.write_text(done.stdout, encoding="utf-8")
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        reasons = [line for line in lines if re.search(r"\b[Ee]rror\b", line)]
        reason = (reasons or lines[-1:] or ["it says nothing"])[0]
        raise TargetError(f"{problem}: {reason}.", f"See '{log}'.")
