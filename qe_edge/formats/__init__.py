"""Formats of other runtimes that a quantized checkpoint is written in, one file each.

A new format is a file with a `Format` subclass and a line in `FORMATS`, or an entry point of the group
`qe_edge.formats` in a package of its own.
"""

from __future__ import annotations

from qe_edge.formats.base import Format
from qe_edge.system.registry import Registry

FORMATS: Registry[type[Format]] = Registry(
    "format",
    {
        "compressed-tensors": "qe_edge.formats.compressed_tensors:CompressedTensors",
        "gptq": "qe_edge.formats.gptq:GPTQ",
        "gguf": "qe_edge.formats.gguf_file:GGUF",
    },
    group="qe_edge.formats",
    base=Format,
)

__all__ = ["FORMATS", "Format"]
