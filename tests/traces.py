"""Traces that tests share, because torch takes seconds for one.

Linear layers are bare nodes in it, so that models that differ in their quantized layers alone have the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qe_edge.layers.linear import QELinear
from qe_edge.models.family import GraphSpec

PLAIN = (bool, int, float, str, type(None))
Trace = Callable[[GraphSpec], ir.Model]


def shared(trace: Trace, folder: Path) -> Trace:
    """A trace that is made once for models that differ in their quantized layers alone.

    Args:
        trace: Makes one.
        folder: Where the processes of a run keep theirs.
    """

    def trace_once(spec: GraphSpec) -> ir.Model:
        kept = folder / f"{fingerprint(spec)}.onnx"
        if not kept.exists():
            part = folder / f"{os.getpid()}.part"
            part.write_bytes(ir.to_proto(trace(spec)).SerializeToString())
            part.replace(kept)
        return ir.from_proto(onnx.ModelProto.FromString(kept.read_bytes()))

    return trace_once


def fingerprint(spec: GraphSpec) -> str:
    """Digest of all that a trace sees: modules with their settings and tensors, inputs, names and dynamic shapes."""
    digest = hashlib.sha256()
    for value in _seen(spec):
        digest.update(repr(value).encode() if not isinstance(value, bytes) else value)
        digest.update(b"\0")
    return digest.hexdigest()


def _seen(spec: GraphSpec) -> Iterator[object]:
    yield spec.name, spec.input_names, spec.output_names, spec.dynamic_shapes
    yield from _tensors(spec.inputs)
    for name, module in spec.module.named_modules():
        layer = isinstance(module, QELinear) or type(module) is nn.Linear  # a bare node, whatever it holds
        yield name, "linear" if layer else type(module)
        if layer:
            yield module.in_features, module.out_features
            continue
        yield from (entry for entry in sorted(vars(module).items()) if _is_plain(entry[1]))
        if isinstance(config := getattr(module, "config", None), PretrainedConfig):
            yield config.to_json_string(use_diff=False)
        yield from _tensors(dict(module.named_parameters(recurse=False)))
        yield from _tensors(dict(module.named_buffers(recurse=False)))


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(one) for one in value)
    return isinstance(value, PLAIN)


def _tensors(value: object) -> Iterator[object]:
    if isinstance(value, Tensor):
        yield value.shape, value.dtype, value.stride()
        if not value.is_meta:
            yield value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else value.item()
    elif isinstance(value, dict):
        for name, one in value.items():
            yield name
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    else:
        yield value
