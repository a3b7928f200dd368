"""Asks a plugin library: `python -m qe_edge.export.plugin_check_child < question.json`; the last line is the answer."""

from __future__ import annotations

import importlib
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import onnxruntime as ort
from pydantic import TypeAdapter

from qe_edge.export.plugin_check import REBUILD, LayerForm, Question, Verdict
from qe_edge.export.targets import CUDA
from qe_edge.layers.kernel_library import KernelLibrary, problem_of
from qe_edge.prepack.unpack import Form
from qe_edge.runtime.plugin_library import CREATOR, find_operator_library, load_plugin_library
from qe_edge.runtime.sessions import first_line, ort_errors
from qe_edge.system.errors import TargetError

OPTIONAL = ("has_zeros", "has_inv_omega")  # operands that any layer may have


def answer(question: Question) -> Verdict:
    """Load the library and make one plugin for every form; why it refuses one goes to standard error.

    Example:
        >>> from pathlib import Path  # doctest: +SKIP
        >>> library, forms = Path("qe_edge/lib/libqe_plugin.so"), [LayerForm("mlp.up", 4096, 11008)]  # doctest: +SKIP
        >>> answer(Question("tensorrt", library, layout_version=4, forms=forms))  # doctest: +SKIP
    """
    if question.backend == CUDA:
        return _answer_of_operator(question)
    trt = importlib.import_module(question.backend)
    try:
        load_plugin_library(trt, question.library)
    except TargetError as error:
        return Verdict(error.problem, error.remedy)
    creator = trt.get_plugin_registry().get_creator(*CREATOR)
    for number, form in enumerate(question.forms):
        if _make(trt, creator, form, question.layout_version) is None:
            return Verdict(refused=number)
    return Verdict()


def _answer_of_operator(question: Question) -> Verdict:
    """As `answer`, of the library that ONNX Runtime loads and of the kernels that it takes from the plugin's."""
    try:
        operator = find_operator_library(question.library)
        ort.SessionOptions().register_custom_ops_library(str(operator))
        kernels = KernelLibrary(str(question.library))
        if kernels.layout_version() != question.layout_version:
            return _refused(0, "The weights have another layout version.")
    except TargetError as error:
        return Verdict(error.problem, error.remedy)
    except ort_errors() as error:
        return Verdict(f"ONNX Runtime cannot load '{operator}': {first_line(error)}", REBUILD)
    for number, form in enumerate(question.forms):
        numbers = {key: value for key, value in asdict(form).items() if key != "name"}
        packed = Form(**numbers, has_zeros=0, has_inv_omega=0, adapter_bits=16, weight_bits=4)
        try:
            kernels.memory(problem_of(packed, "f16", tokens=1))
        except TargetError as error:
            return _refused(number, f"{error.problem} {error.remedy}")
    return Verdict()


def _refused(number: int, words: str) -> Verdict:
    sys.stderr.write(f"QELinear: {words}\n")
    return Verdict(refused=number)


def _make(trt: Any, creator: Any, form: LayerForm, layout_version: int) -> object | None:  # noqa: ANN401 - untyped
    numbers = {key: value for key, value in asdict(form).items() if key != "name"}
    # 3 bits are for layers that have kernels for them, decided when weights are packed: 4 is what the others get
    numbers |= {"layout_version": layout_version, "weight_bits": 4, "adapter_bits": 16}
    numbers |= dict.fromkeys(OPTIONAL, 0)
    fields = [
        trt.PluginField(key, np.array([value], np.int32), trt.PluginFieldType.INT32) for key, value in numbers.items()
    ]
    made: object | None = creator.create_plugin(form.name, trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    return made


if __name__ == "__main__":
    found = answer(TypeAdapter(Question).validate_json(sys.stdin.read()))
    sys.stdout.write(f"\n{TypeAdapter(Verdict).dump_json(found).decode()}\n")
