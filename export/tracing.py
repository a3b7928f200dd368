"""From PyTorch modules to an ONNX graph in which every linear layer, quantized or not, is one bare `QELinear` node."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from qe_edge.export.op import DOMAIN, LAYER, NAME, OPSET, VERSION
from qe_edge.export.plain_linears import PlainLinear, plain_linears, set_aside
from qe_edge.layers.embedding import QuantizedEmbedding
from qe_edge.layers.linear import QELinear, quantized_linears
from qe_edge.models.export_limits import OF_LENGTH
from qe_edge.models.family import GraphSpec
from qe_edge.models.precision import in_float32
from qe_edge.models.tables import embeddings_of
from qe_edge.system.errors import ModelError


@contextmanager
def exportable(model: nn.Module) -> Iterator[dict[str, PlainLinear]]:
    """Prepare a model for tracing: float32, eager attention, linear layers as bare nodes; undone afterwards.

    Yields:
        The tensors of the layers that are not quantized, by dotted name; the layers hold placeholders meanwhile.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> model = load_model("demo").model
        >>> with exportable(model):
        ...     print(model.config._attn_implementation, model.dtype)
        eager torch.float32
    """
    with ExitStack() as stack:
        # tensors of quantized layers are converted when they are written, those of token embeddings never
        tables = [id(table) for table in (*embeddings_of(model).values(), second_embedding(model))]
        linears = plain_linears(model)
        tables += [id(linear) for linear in linears.values()]
        kept = (QELinear, QuantizedEmbedding)
        others = (one for one in model.modules() if not isinstance(one, kept) and id(one) not in tables)
        stack.enter_context(in_float32(others))
        stack.enter_context(_eager_attention(model))
        stack.enter_context(_fixed_rotary(model))
        tensors = stack.enter_context(set_aside(linears))
        for name, layer in (quantized_linears(model) | linears).items():
            layer.__dict__["forward"] = _bare_node(name, layer.out_features)
            stack.callback(layer.__dict__.pop, "forward")
        yield tensors


def second_embedding(model: Any) -> Any:  # noqa: ANN401 - transformers' own classes
    """A text model's embedding of tokens for its layers, as Gemma 4 has one; None of any other model.

    Example:
        >>> from qe_edge.models.loading import load_model
        >>> second_embedding(load_model("demo").model) is None
        True
    """
    found = getattr(model, "get_per_layer_input_embeddings", None)
    width: Any = getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0)
    return found() if found is not None and width else None


def trace_graph(spec: GraphSpec) -> ir.Model:
    """Trace a module that `exportable` has prepared.

    Raises:
        ModelError: If torch cannot export it.

    Example:
        >>> from qe_edge.models.loading import load_model  # doctest: +SKIP
        >>> loaded = load_model("demo")  # doctest: +SKIP
        >>> with exportable(loaded.model):  # doctest: +SKIP
        ...     graphs = [trace_graph(spec) for spec in loaded.family.graphs(loaded.model)]
    """
    with warnings.catch_warnings(), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own internals
        try:
            program = torch.onnx.export(
                spec.module,
                spec.inputs,
                dynamo=True,
                opset_version=OPSET,
                input_names=spec.input_names,
                output_names=spec.output_names,
                dynamic_shapes=spec.dynamic_shapes,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ModelError(
                f"The {spec.name} part of the model cannot be exported: {_root_cause(error)}",
                "Use the versions of torch and transformers in constraints.txt; if it fails with them too, choose "
                "another model: this one computes what no graph can hold.",
            ) from error
    if program is None:
        raise ModelError(f"The {spec.name} part was not exported.", "Use the torch version in constraints.txt.")
    model: ir.Model = program.model
    return model


def _bare_node(name: str, out_features: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{NAME}",
            (x,),
            attrs={LAYER: name},
            dtype=x.dtype,
            shape=(*x.shape[:-1], out_features),
            version=VERSION,
        )

    return forward


@contextmanager
def _eager_attention(model: nn.Module) -> Iterator[None]:
    """Attention in plain matrix products: fused operators differ between targets."""
    configs: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            configs.setdefault(id(config), (config, config._attn_implementation))
    for config, _ in configs.values():
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in configs.values():
            config._attn_implementation = implementation


@contextmanager
def _fixed_rotary(model: nn.Module) -> Iterator[None]:
    """Dynamic NTK and longrope as they are up to the length of `context_of`, beyond which nothing is encoded.

    A module that has seen a longer text holds other frequencies until it sees a short one; meanwhile it has the first.
    """
    changed: list[tuple[Any, str, Tensor]] = []
    for module in model.modules():
        if getattr(module, "rope_type", None) in OF_LENGTH:
            rotary: Any = module
            changed.append((rotary, rotary.rope_type, rotary.inv_freq))
            rotary.rope_type, rotary.inv_freq = "default", rotary.original_inv_freq
    try:
        yield
    finally:
        for rotary, kind, frequencies in changed:
            rotary.rope_type, rotary.inv_freq = kind, frequencies


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs which optional operators are not installed, and prints and logs its graph when it fails."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
