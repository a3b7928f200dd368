"""Checks, before any long work, that the TensorRT plugin can run: target, library, and the layers' forms.

The library itself is asked, in a process of its own. It refuses the same layers here as when an engine is built, and a
library that crashes takes only that process with it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from qe_edge.export.targets import Target, get_target
from qe_edge.runtime.engine_info import Backend
from qe_edge.runtime.plugin_library import find_plugin_library
from qe_edge.system.child_process import isolated_module, safe_environment
from qe_edge.system.errors import InputError, TargetError
from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    from qe_edge.prepack import lower
else:
    lower = lazy_module("qe_edge.prepack.lower")

CHILD = "qe_edge.export.plugin_check_child"
REBUILD = "Build it for this machine with 'qe-edge build-plugin'."


@dataclass(frozen=True)
class LayerForm:
    """The attributes of a layer that decide whether the plugin runs it.

    Attributes:
        name: Dotted name, for messages.
        in_features: Width of the input.
        out_features: Width of the output, or of all outputs together if layers are joined to one.
        act_bits: Bits of the activations, 0 for 16-bit ones.
        group_size: Input channels per scale of the weight; -1 for one scale per output channel.
        rank_shared: Rank of the shared expert.
        rank_routed: Rank of every routed expert.
        num_experts: Number of routed experts.
    """

    name: str
    in_features: int
    out_features: int
    act_bits: int = 8
    group_size: int = -1
    rank_shared: int = 0
    rank_routed: int = 0
    num_experts: int = 0


@dataclass(frozen=True)
class Question:
    """The question of the child process to a library.

    Attributes:
        backend: Python module that loads it.
        library: The library.
        layout_version: Version of the layout in which weights are going to be packed.
        forms: Layers that it should run.
    """

    backend: Backend
    library: Path
    layout_version: int
    forms: Sequence[LayerForm]


@dataclass(frozen=True)
class Verdict:
    """The answer of the child process.

    Attributes:
        problem: Why the library cannot be loaded, in one sentence; "" if it can.
        remedy: The remedy for that.
        refused: Number of the first form that it refuses, None if none.
    """

    problem: str = ""
    remedy: str = ""
    refused: int | None = None


def choose_plugin(targets: Sequence[str], library: Path | None) -> Path:
    """The library to build with, checked: some target takes it, it exists, loads, and reads our layout of weights.

    Args:
        targets: Names of the targets that are going to be built.
        library: The library that the user names; None looks for it.

    Raises:
        UnknownNameError: If there is no target of a name.
        InputError: If none of them takes the plugin.
        TargetError: If there is no library, or it does not serve.

    Example:
        >>> choose_plugin(["cpu"], library=None)
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: Target 'cpu' is ONNX Runtime on any CPU, which takes no TensorRT plugin.
        Leave --plugin out, or build for another target.
    """
    chosen = [get_target(name) for name in targets]
    takers = [target for target in chosen if takes_plugin(target)]
    if not takers:
        check_plugin_target(chosen[0])
    found = find_plugin_library(library)
    check_forms(takers, found, [LayerForm("layer", in_features=128, out_features=128)])
    return found


def takes_plugin(target: Target) -> bool:
    """Whether a target's backend can run the plugin.

    Example:
        >>> takes_plugin(get_target("jetson-orin")), takes_plugin(get_target("cpu"))
        (True, False)
    """
    return target.backend != "onnxruntime"


def check_plugin_target(target: Target) -> None:
    """Refuse a target whose backend takes no plugin.

    Raises:
        InputError: If it is one.

    Example:
        >>> check_plugin_target(get_target("rtx"))
        >>> check_plugin_target(get_target("cpu"))
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.InputError: Target 'cpu' is ONNX Runtime on any CPU, which takes no TensorRT plugin.
        Leave --plugin out, or build for another target.
    """
    if not takes_plugin(target):
        raise InputError(
            f"Target '{target.name}' is {target.title}, which takes no TensorRT plugin.",
            "Leave --plugin out, or build for another target.",
        )


def check_plugin_given(targets: Sequence[str]) -> None:
    """Refuse targets that need the plugin's kernels where the user wants none.

    Raises:
        UnknownNameError: If there is no target of a name.
        InputError: If one needs them.

    Example:
        >>> check_plugin_given(["cpu", "rtx"])
    """
    for target in map(get_target, targets):
        if target.needs_plugin:
            raise InputError(f"Target '{target.name}' runs layers on the plugin's kernels alone.", "Add --plugin.")


def check_forms(targets: Sequence[Target], library: Path, forms: Sequence[LayerForm]) -> None:
    """Refuse layers that the plugin cannot run, and a library of another layout of weights.

    Args:
        targets: Targets; those that take no plugin are left out.
        library: The plugin's library.
        forms: The layers.

    Raises:
        TargetError: Naming the first such layer, or saying why the library cannot be asked.

    Example:
        >>> forms = [LayerForm("mlp.up", in_features=4096, out_features=11008, rank_shared=64)]  # doctest: +SKIP
        >>> check_forms([get_target("tensorrt")], find_plugin_library(), forms)  # doctest: +SKIP
    """
    for backend in dict.fromkeys(target.backend for target in targets if takes_plugin(target)):
        _ask(backend, library, list(dict.fromkeys(forms)))


def refusal(layer: str, words: str) -> TargetError:
    """The error for a layer that the plugin refuses in `words`, one or two sentences.

    Example:
        >>> print(refusal("mlp.up", "rank_shared is 200. Use at most 128."))
        The plugin cannot run the layer 'mlp.up': rank_shared is 200. Use at most 128.
    """
    problem, _, remedy = words.partition(". ")
    return TargetError(
        f"The plugin cannot run the layer '{layer}': {problem.removesuffix('.')}.", remedy or "Build without --plugin."
    )


def _ask(backend: Backend, library: Path, forms: Sequence[LayerForm]) -> None:
    question = TypeAdapter(Question).dump_json(Question(backend, library, lower.LAYOUT_VERSION, forms))
    done = subprocess.run(
        isolated_module(CHILD), input=question, capture_output=True, check=False, env=safe_environment()
    )
    try:
        verdict = TypeAdapter(Verdict).validate_json((done.stdout.splitlines() or [b""])[-1])
    except ValidationError as error:
        raise TargetError(f"{backend} crashed on the plugin library '{library}'.", REBUILD) from error
    if verdict.problem:
        raise TargetError(verdict.problem, verdict.remedy)
    if verdict.refused is None:
        return
    words = _reason(done.stderr.decode(errors="replace"))
    if "layout version" in words or "attribute is unknown" in words:  # an older library knows fewer attributes
        raise TargetError(
            f"The plugin library '{library}' reads another layout of weights than {lower.LAYOUT_VERSION}, which this "
            "QE-Edge writes.",
            REBUILD,
        )
    raise refusal(forms[verdict.refused].name, words)


def _reason(stderr: str) -> str:
    """The last message of the plugin."""
    said = [line.partition("QELinear: ")[2].strip() for line in stderr.splitlines() if "QELinear: " in line]
    return said[-1] if said else "It gives no reason."
