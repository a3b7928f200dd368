"""Opens canonical graphs of strangers; an error names the graph and its fault in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import Error as ProtobufError  # type: ignore[import-untyped] # it ships no types

from qe_edge.export.contract import check_layers
from qe_edge.export.signature import tensor_spec
from qe_edge.runtime.graph_files import REMEDY, check_graph_file
from qe_edge.runtime.graph_specs import GraphFile, TensorSpec
from qe_edge.system.errors import ArtifactError, ModelError, QEError, ResourceError

# What onnx, onnx-ir, numpy and our own passes raise when a graph is not what it should be; they share no base.
GRAPH_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
    onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ProtobufError, ir.passes.InvariantError,
)  # fmt: skip


def open_graph(folder: Path, entry: GraphFile) -> ir.Model:
    """A canonical graph, checked: its file, its form as ONNX, its inputs and outputs, and its layers.

    Args:
        folder: ONNX folder whose manifest was read.
        entry: The graph in the manifest.

    Raises:
        ArtifactError: If one of these checks fails.

    Example:
        >>> from qe_edge.runtime.manifest import read_manifest  # doctest: +SKIP
        >>> folder = Path("out/demo/onnx")  # doctest: +SKIP
        >>> model = open_graph(folder, read_manifest(folder).graphs["language"])  # doctest: +SKIP
    """
    path = folder / entry.file
    check_graph_file(folder, entry.file)
    with explained(f"'{path}' is no valid ONNX graph", ArtifactError, REMEDY):
        onnx.checker.check_model(str(path), full_check=True)
        model = ir.load(path)
        for kind, values, specs in (
            ("inputs", model.graph.inputs, entry.inputs),
            ("outputs", model.graph.outputs, entry.outputs),
        ):
            if _specs(values) != list(specs):
                raise ArtifactError(f"The {kind} of '{path}' are not those of the manifest.", REMEDY)
        check_layers(model, path)
    return model


@contextmanager
def explained(problem: str, error: type[QEError], remedy: str) -> Iterator[None]:
    """Turn the errors that libraries raise about a stranger's graph into an error of ours.

    Args:
        problem: First sentence, without its full stop; the reason is added.
        error: Class of the error.
        remedy: Its second sentence.

    Raises:
        QEError: Of the class `error`; ResourceError if there is too little memory.

    Example:
        >>> with explained("'language.onnx' is no valid ONNX graph", ArtifactError, REMEDY):
        ...     raise ValueError("a node has no output")
        Traceback (most recent call last):
            ...
        qe_edge.system.errors.ArtifactError: 'language.onnx' is no valid ONNX graph: a node has no output. Export
        the model again.
    """
    try:
        yield
    except MemoryError as cause:
        raise ResourceError(f"{problem}: it needs more memory than there is.", remedy) from cause
    except GRAPH_ERRORS as cause:
        raise error(f"{problem}: {_reason(cause)}.", remedy) from cause


def _specs(values: Iterable[ir.Value]) -> list[TensorSpec] | None:
    """Inputs or outputs as the manifest lists them, None if it could not."""
    try:
        return [tensor_spec(value) for value in values]
    except ModelError:
        return None


def _reason(error: BaseException) -> str:
    """The first line of a library's message, at most 300 characters; of a chain of errors the first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(". ") if lines else type(error).__name__)[:300]
