"""Examines this machine: the parts that work, and the missing parts with a remedy for each.

Every library is examined in a process of its own: a broken installation that aborts or hangs costs one line of the
table, never the table. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qe_edge.system.child_process import find_program, isolated_code, safe_environment
from qe_edge.system.errors import TargetError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import psutil
    from packaging import requirements

    from qe_edge.export import targets
    from qe_edge.runtime import cuda_provider, plugin_library
else:  # what a broken installation lacks costs the section that needs it
    psutil = lazy_module("psutil")
    requirements = lazy_module("packaging.requirements")
    targets = lazy_module("qe_edge.export.targets")
    plugin_library = lazy_module("qe_edge.runtime.plugin_library")
    cuda_provider = lazy_module("qe_edge.runtime.cuda_provider")

OK, MISSING, WRONG = "ok", "missing", "wrong"
PROBE_SECONDS = 60
CPU_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
PROBES = {
    "numpy": (
        "import numpy; blas = numpy.show_config(mode='dicts')['Build Dependencies']['blas'];"
        "print(json.dumps({'blas': blas.get('name', '?') + ' ' + str(blas.get('version', ''))}))"
    ),
    "onnxruntime": "import onnxruntime; print(json.dumps({'providers': onnxruntime.get_available_providers()}))",
    "torch": (
        "import torch; cuda = torch.cuda.is_available();"
        "print(json.dumps({'cuda': torch.version.cuda, 'threads': torch.get_num_threads(), 'devices': ["
        "{'name': torch.cuda.get_device_name(i), 'capability': '%d%d' % torch.cuda.get_device_capability(i),"
        " 'memory': torch.cuda.get_device_properties(i).total_memory}"
        " for i in range(torch.cuda.device_count() if cuda else 0)]}))"
    ),
    "tensorrt": "import tensorrt as trt; print(json.dumps({'version': trt.__version__}))",
    "tensorrt_rtx": "import tensorrt_rtx as trt; print(json.dumps({'version': trt.__version__}))",
}


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis.

    Attributes:
        group: "Python", "Packages", "Machine", "GPU" or "Targets".
        name: The part that was examined.
        state: "ok", "missing" (not there, and needed only for some uses) or "wrong" (stops QE-Edge from working).
        detail: The finding in a few words.
        remedy: One sentence saying what to do, empty if there is nothing to do.
    """

    group: str
    name: str
    state: str
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings.

    Attributes:
        findings: In the order in which they are shown.
    """

    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether nothing stops QE-Edge from working on this machine."""
        return all(finding.state != WRONG for finding in self.findings)

    def to_json(self) -> str:
        """The diagnosis as JSON text."""
        return json.dumps({"healthy": self.healthy, "findings": [asdict(item) for item in self.findings]}, indent=2)


def examine(folder: Path | None = None) -> Diagnosis:
    """Examine everything. It takes a few seconds, because each library starts in a process of its own.

    Args:
        folder: A folder on the disk to examine; the current folder if None.

    Example:
        >>> for finding in examine().findings:  # doctest: +SKIP
        ...     print(finding.group, finding.name, finding.state, finding.remedy)
    """
    probes = {name: _start(code) for name, code in PROBES.items() if _installed(name)}
    seen = {name: _result(process) for name, process in probes.items()}
    sections: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        lambda: _machine(seen, folder or Path.cwd()),
        lambda: _runtimes(seen),
        lambda: _gpu(seen),
        _targets,
    ]
    return Diagnosis([finding for section in sections for finding in _unbroken(section)])


def _unbroken(section: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(section())
    except Exception as error:  # noqa: BLE001 - a diagnosis that crashes on a broken machine is of no use
        return [Finding("Doctor", section.__name__, MISSING, f"could not be examined: {error}")]


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    remedy = "" if supported else "Use Python 3.10, 3.11, 3.12 or 3.13."
    yield Finding("Python", "Python", OK if supported else WRONG, f"{version} on {platform.platform()}", remedy)


def _packages() -> Iterator[Finding]:
    """Every requirement of this package, extras too, against what is installed."""
    for line in metadata.requires("qe-edge") or []:
        requirement = requirements.Requirement(line)
        extras = ("", "quantize", "cuda", "tensorrt", "rtx")
        extra = next((name for name in extras if _applies(requirement, name)), None)
        if extra is None:
            continue
        install = (
            f'pip install "qe-edge[{extra}]"' if extra else f'pip install "{requirement.name}{requirement.specifier}"'
        )
        version = _version(requirement.name)
        if version is None and requirement.name == "onnxruntime":
            version = _version("onnxruntime-gpu")  # the same package, built for CUDA
        if version is None:
            if not extra:
                yield Finding("Packages", requirement.name, WRONG, "not installed", install)
            elif extra == "quantize":
                yield Finding("Packages", requirement.name, MISSING, "not installed; quantizing needs it", install)
        elif requirement.specifier.contains(version, prereleases=True):
            yield Finding("Packages", requirement.name, OK, f"{version} (supported: {requirement.specifier})")
        else:
            detail = f"{version} is outside {requirement.specifier}"
            yield Finding("Packages", requirement.name, WRONG, detail, install)


def _machine(seen: dict[str, dict[str, object] | str], folder: Path) -> Iterator[Finding]:
    features = [name for name in CPU_FEATURES if name in _cpu_flags()]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{platform.machine()}, {usable} usable threads, {' '.join(features) or 'no known vector features'}"
    yield Finding("Machine", "CPU", OK, detail)
    numpy = seen.get("numpy")
    yield Finding("Machine", "BLAS", OK, str(numpy["blas"]) if isinstance(numpy, dict) else "unknown")
    memory = psutil.virtual_memory()
    low = memory.available < 2 * 2**30
    yield Finding(
        "Machine", "Memory", MISSING if low else OK,
        f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        "Close other programs; a 2 B model needs about 12 GiB to quantize." if low else "",
    )  # fmt: skip
    free = shutil.disk_usage(folder).free
    low = free < 2 * 2**30
    yield Finding(
        "Machine", "Disk", MISSING if low else OK, f"{free / 2**30:.1f} GiB free in {folder}",
        "Free some space, or write to another disk." if low else "",
    )  # fmt: skip


def _runtimes(seen: dict[str, dict[str, object] | str]) -> Iterator[Finding]:
    runtime = seen.get("onnxruntime", "not installed")
    if isinstance(runtime, str):
        yield Finding("Runtimes", "ONNX Runtime", WRONG, runtime, "Run: pip install --force-reinstall onnxruntime")
    else:
        providers = [str(name) for name in _items(runtime.get("providers"))]
        yield Finding("Runtimes", "ONNX Runtime", OK, ", ".join(providers))
        off = os.environ.get("ORT_DISABLE_TELEMETRY", "1") not in ("", "0")
        detail = "off" if off else "on, as ORT_DISABLE_TELEMETRY says: a device id in ~/.cache, events to Microsoft"
        yield Finding("Runtimes", "ORT telemetry", OK, detail)
        if _items(_table(seen.get("torch")).get("devices")) and "CUDAExecutionProvider" not in providers:
            remedy = cuda_provider.INSTALL
            yield Finding("Runtimes", "ONNX Runtime CUDA", MISSING, "a GPU is there, its provider is not", remedy)
    remedies = {
        "tensorrt": 'On a Jetson it comes with JetPack; elsewhere run: pip install "qe-edge[tensorrt]"',
        "tensorrt_rtx": 'Run: pip install "qe-edge[rtx]"',
    }
    for module, name in (("tensorrt", "TensorRT"), ("tensorrt_rtx", "TensorRT-RTX")):
        found = seen.get(module, "not installed")
        if isinstance(found, str):
            yield Finding("Runtimes", name, MISSING, found, remedies[module])
        else:
            yield Finding("Runtimes", name, OK, str(found.get("version")))


def _gpu(seen: dict[str, dict[str, object] | str]) -> Iterator[Finding]:
    jetson = _first_line(Path("/etc/nv_tegra_release"))
    if jetson:
        yield Finding("GPU", "Jetson", OK, jetson)
    torch = seen.get("torch", "not installed")
    devices = [_table(device) for device in _items(_table(torch).get("devices"))]
    for device in devices:
        memory = f"{int(str(device['memory'])) / 2**30:.1f} GiB"
        yield Finding("GPU", "CUDA device", OK, f"{device['name']}, sm_{device['capability']}, {memory}")
    if not devices:
        yield Finding("GPU", "CUDA device", MISSING, *_no_cuda(torch))
    driver = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if driver:
        yield Finding("GPU", "NVIDIA driver", OK, driver)
    elif jetson:
        found = find_program("tegrastats")
        yield Finding("GPU", "NVIDIA driver", OK if found else MISSING, "JetPack's" if found else "no tegrastats")
    else:
        yield Finding(
            "GPU", "NVIDIA driver", MISSING, "no nvidia-smi",
            "Nothing to do on a machine without an NVIDIA GPU; else install its driver.",
        )  # fmt: skip
    nvcc = _output(["nvcc", "--version"]) or _output(["/usr/local/cuda/bin/nvcc", "--version"])
    if nvcc:
        yield Finding("GPU", "nvcc", OK, nvcc.splitlines()[-1])
    else:
        yield Finding(
            "GPU", "nvcc", MISSING, "not found", "Only for compiling the TensorRT plugin: install the CUDA toolkit."
        )
    yield _plugin()
    yield _operator()


def _plugin() -> Finding:
    """Whether `--plugin` finds its library."""
    return _library("TensorRT plugin", "--plugin", plugin_library.find_plugin_library)


def _operator() -> Finding:
    """Whether the target `cuda` finds its library."""
    return _library("ONNX Runtime operator", "the target cuda", plugin_library.find_operator_library)


def _library(name: str, use: str, find: Callable[[], Path]) -> Finding:
    try:
        return Finding("GPU", name, OK, f"{find()}, not yet run on hardware")
    except TargetError as error:
        return Finding("GPU", name, MISSING, error.problem, f"Only for {use}: {error.remedy}")


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _table(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _no_cuda(torch: dict[str, object] | str) -> tuple[str, str]:
    """Why torch sees no GPU, and what to do."""
    if isinstance(torch, str):
        return f"torch: {torch}", "Run: pip install torch."
    if torch.get("cuda") is None:
        return "torch is a build for the CPU", "Nothing to do without an NVIDIA GPU; else install torch's CUDA build."
    return f"torch's CUDA {torch['cuda']} finds no GPU", "Check the driver, or go on with the CPU."


def _targets() -> Iterator[Finding]:
    """Which targets can be built and which can be run here."""
    for name, target in targets.TARGETS.items():
        build, run = target.build_problem(), target.run_problem()
        if build is not None:
            yield Finding("Targets", name, MISSING, build, target.remedy)
        elif run is not None:
            yield Finding("Targets", name, OK, f"can be built here, not run: {run}")
        else:
            yield Finding("Targets", name, OK, "can be built and run here")


def _applies(requirement: object, extra: str) -> bool:
    marker = getattr(requirement, "marker", None)
    return marker is None or bool(marker.evaluate({"extra": extra}))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        isolated_code(f"import json; {code}"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, text=True, env=safe_environment(),
    )  # fmt: skip


def _result(process: subprocess.Popen[str]) -> dict[str, object] | str:
    """What a probe printed, or a sentence saying how it failed."""
    try:
        output, errors = process.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"installed, but does not answer within {PROBE_SECONDS} s"
    try:
        values = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        last = errors.strip().splitlines()
        return f"installed, but cannot be imported ({last[-1] if last else f'exit code {process.returncode}'})"
    return values if isinstance(values, dict) else "installed, but gives no answer"


def _output(command: list[str]) -> str | None:
    """Standard output of a short command, or None if it is not there or fails."""
    program = find_program(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]], capture_output=True, text=True, timeout=10, check=True, env=safe_environment()
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith(("flags", "Features"))), set())
