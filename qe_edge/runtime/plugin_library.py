"""Where `libqe_plugin.so` is, and `libqe_ort.so` beside it, and loading it into TensorRT. Not yet run on hardware."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qe_edge.system.errors import TargetError

FILE = "libqe_plugin.so"
OPERATOR_FILE = "libqe_ort.so"  # the same kernels as an operator of ONNX Runtime; takes them from the library beside it
VARIABLE = "QE_EDGE_PLUGIN_LIBRARY"  # for programs that cannot pass a path on
CREATOR = ("QELinear", "1", "")  # operator, version and namespace under which TensorRT knows the plugin
REMEDY = "Build it with 'qe-edge build-plugin', or name one with --plugin-library."


def find_plugin_library(chosen: Path | None = None) -> Path:
    """The plugin's library: the chosen one, else the one of the environment, of the package, or of a build folder.

    Raises:
        TargetError: If there is none, or the chosen one does not exist.

    Example:
        >>> find_plugin_library(Path("no-such-library.so"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.TargetError: There is no plugin library 'no-such-library.so'. Build it with 'qe-edge
        build-plugin', or name one with --plugin-library.
    """
    if chosen is None and os.environ.get(VARIABLE):
        chosen = Path(os.environ[VARIABLE])
    if chosen is not None:
        if not chosen.is_file():
            raise TargetError(f"There is no plugin library '{chosen}'.", REMEDY)
        return chosen.resolve()
    found = next((path for path in _usual_places() if path.is_file()), None)
    if found is None:
        raise TargetError(f"The plugin library {FILE} is not on this machine.", REMEDY)
    return found


def find_operator_library(chosen: Path | None = None) -> Path:
    """The operator's library for ONNX Runtime, beside the plugin's.

    Args:
        chosen: The plugin's library, as for `find_plugin_library`.

    Raises:
        TargetError: If either is missing.

    Example:
        >>> Path("libqe_plugin.so").touch()
        >>> find_operator_library(Path("libqe_plugin.so"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.TargetError: The plugin library has no libqe_ort.so beside it, which ONNX Runtime
        needs. Build both anew with 'qe-edge build-plugin'.
    """
    library = find_plugin_library(chosen).with_name(OPERATOR_FILE)
    if not library.is_file():
        raise TargetError(
            f"The plugin library has no {OPERATOR_FILE} beside it, which ONNX Runtime needs.",
            "Build both anew with 'qe-edge build-plugin'.",
        )
    return library


def build_folder(arch: str | None = None) -> Path:
    """The default folder of `qe-edge build-plugin` for the library of an architecture; None for this machine's.

    Example:
        >>> build_folder("aarch64").name
        'plugin-aarch64'
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # as its specification has it; a relative one would mean wherever the user is
        cache = Path.home() / ".cache"
    return cache / "qe-edge" / (f"plugin-{arch}" if arch else "plugin")


def checkout() -> Path | None:
    """The folder `plugins` of the source checkout that this package is installed from, None for a wheel.

    Example:
        >>> folder = checkout()
        >>> folder is None or folder.name
        'plugins'
    """
    folder = Path(__file__).resolve().parents[2] / "plugins"
    return folder if (folder / "CMakeLists.txt").is_file() else None


def digest(library: Path) -> str:
    """SHA-256 of the library, as `engine.json` records it.

    Example:
        >>> _ = Path("libqe_plugin.so").write_bytes(b"")
        >>> digest(Path("libqe_plugin.so"))[:16]
        'e3b0c44298fc1c14'
    """
    return hashlib.sha256(library.read_bytes()).hexdigest()


def load_plugin_library(trt: Any, library: Path) -> None:  # noqa: ANN401 - an untyped extension module
    """Register the plugin with TensorRT, once per process; needed before an engine that uses it is built or loaded.

    Raises:
        TargetError: If TensorRT cannot load it.

    Example:
        >>> import tensorrt  # doctest: +SKIP
        >>> load_plugin_library(tensorrt, find_plugin_library())  # doctest: +SKIP
    """
    registry = trt.get_plugin_registry()
    if registry.get_creator(*CREATOR) is not None:
        return
    problem = ""
    try:
        registry.load_library(str(library))
    except (RuntimeError, ValueError) as error:
        problem = f": {error}".strip().splitlines()[0]
    if registry.get_creator(*CREATOR) is None:
        raise TargetError(
            f"{trt.__name__} {trt.__version__} cannot load the plugin library '{library}'{problem}.",
            "Build it for this machine with 'qe-edge build-plugin'.",
        )


def _usual_places() -> Iterator[Path]:
    yield Path(__file__).resolve().parents[1] / "lib" / FILE
    yield build_folder() / FILE
    sources = checkout()
    if sources is not None:
        yield sources / "build" / "plugin" / FILE
